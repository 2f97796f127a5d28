"""A tokenizer makes the tokens that its file says, or that is said; the file is parsed once for that, until it changes."""

import json

import tokenizers

from qlora.base_model import follows_its_file


def test_a_file_is_parsed_once_and_again_when_it_changes(tokenizer, tmp_path, monkeypatch):
    parsed, read = [], tokenizers.Tokenizer.from_file

    class Counted:
        @staticmethod
        def from_file(path):
            parsed.append(path)
            return read(path)

    monkeypatch.setattr(tokenizers, "Tokenizer", Counted)
    tokenizer.save_pretrained(tmp_path)
    assert [follows_its_file(tmp_path, tokenizer) for _ in range(3)] == [True] * 3
    assert len(parsed) == 1
    file = tmp_path / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"] = []  # of single bytes
    file.write_text(json.dumps(values))
    assert not follows_its_file(tmp_path, tokenizer)
    assert len(parsed) == 2


def test_texts_with_new_tokens_are_not_compared(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tokenizer.add_tokens(["How are"])
    assert not follows_its_file(tmp_path, tokenizer)
    assert follows_its_file(tmp_path, tokenizer, ["How are"])
