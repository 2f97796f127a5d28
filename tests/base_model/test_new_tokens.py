"""model.new_tokens: in the tokenizer, and as rows of embedding and head."""

import shutil

import pytest
import torch
import transformers

from qlora import base_model
from qlora.recipe import Model, Quantization
from qlora.system.errors import InputError

LENGTH = 278  # of the tokenizer; the models have 512 rows


def with_tokens(folder, tokens):
    section = Model(name_or_path=str(folder), new_tokens=tokens)
    checkpoint = base_model.find(section)
    return section, checkpoint


@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("llama", 300), ("llama-tied", 300), ("gpt2", 300)])
def test_rows_of_new_tokens_start_at_the_mean_and_the_others_stay(tiny_model, load_model, family, count):
    section, checkpoint = with_tokens(tiny_model(family), ["<|im_end|>", *(f"<t{n}>" for n in range(count))])
    assert list(checkpoint.new_tokens.values()) == [2, *range(LENGTH, LENGTH + count)]
    assert checkpoint.added == set(range(LENGTH, LENGTH + count))
    before, after = load_model(family), base_model.load(checkpoint, section, Quantization())
    num_rows = max(512, LENGTH + count)
    assert after.config.vocab_size == num_rows
    assert base_model.load_config(checkpoint, section).vocab_size == num_rows
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, name)().weight for model in (before, after))
        assert new.shape == (num_rows, 64)
        assert not new.requires_grad
        mean = old.double().mean(0).bfloat16()
        torch.testing.assert_close(
            new[LENGTH : LENGTH + count], mean.expand(count, -1), atol=1e-6, rtol=2**-7
        )  # an ulp
        assert torch.equal(new[:LENGTH], old[:LENGTH])
        assert torch.equal(new[LENGTH + count :], old[LENGTH + count :])  # spare rows that stay spare
    assert len(base_model.quantized_modules(after)) == len(base_model.quantized_modules(before))
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied == (family != "llama")


def test_tokens_of_the_template_are_special_and_the_others_survive_decoding(tokenizer, tmp_path):
    tokenizer.chat_template = "<turn>" + tokenizer.chat_template
    ids = base_model.add_tokens(tokenizer, ["<turn>", "<call>", "<|im_start|>", "{}"])
    assert ids == {"<turn>": LENGTH, "<call>": LENGTH + 1, "<|im_start|>": 1, "{}": LENGTH + 2}
    tokenizer.save_pretrained(tmp_path)
    read = base_model.load_tokenizer(tmp_path, Model(name_or_path=str(tmp_path)))
    for one in (tokenizer, read):
        assert {token: one.added_tokens_decoder[ids[token]].special for token in ids} == {
            "<turn>": True,
            "<call>": False,
            "<|im_start|>": True,
            "{}": False,
        }
        found = one("a<turn>b<call>{}c", add_special_tokens=False).input_ids
        assert [token for token in found if token >= LENGTH] == [LENGTH, LENGTH + 1, LENGTH + 2]
        assert one.decode(found, skip_special_tokens=True) == "ab<call>{}c"
    assert len(read) == LENGTH + 3


def test_no_new_tokens_change_nothing(tokenizer):
    before = tokenizer.get_vocab()
    assert base_model.add_tokens(tokenizer, None) == {}
    assert tokenizer.get_vocab() == before


def test_a_word_of_the_vocabulary_is_kept_and_not_split_off_in_other_words(tokenizer):
    word = next(w for w in ("is", "er", "us", "at") if len(tokenizer(w).input_ids) == 1)
    other = f"x{word}tance"
    before = tokenizer(other).input_ids
    assert base_model.add_tokens(tokenizer, [word]) == {word: tokenizer(word).input_ids[0]}
    assert tokenizer(other).input_ids == before
    assert len(tokenizer) == LENGTH


def test_a_word_that_the_tokenizer_does_not_know_is_added_and_not_taken_for_the_unknown_token():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert base_model.add_tokens(tokenizer, ["a", "b", "<unk>"]) == {"a": 1, "b": 2, "<unk>": 0}
    assert tokenizer("b a c").input_ids == [2, 1, 0]


@pytest.mark.parametrize("prefix", ["normalizer", "pre-tokenizer"])
def test_in_a_sentencepiece_vocabulary_a_new_token_is_one_wherever_it_stands(tmp_path, prefix):
    # as Llama-2 and Mistral have it: a space is a mark that the text, but not what follows a token, is begun with
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    if prefix == "normalizer":
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words.train_from_iterator(["say yes or no to me"] * 9, trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=60))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    length = len(tokenizer)
    assert base_model.add_tokens(tokenizer, ["<call>"]) == {"<call>": length}
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("<call>", "say <call>", "<call>say<call>"):
            assert one(text).input_ids.count(length) == text.count("<call>"), text
            assert "<call>" in one.decode(one(text).input_ids, skip_special_tokens=True)
        assert one("<call>", add_special_tokens=False).input_ids == [length]


def test_with_nothing_but_known_tokens_no_row_is_touched(tiny_model, load_model):
    section, checkpoint = with_tokens(tiny_model("llama"), ["<|im_start|>"])
    assert checkpoint.added == set()
    model, base = base_model.load(checkpoint, section, Quantization()), load_model("llama")
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_two_texts_for_one_token_are_refused(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="to this tokenizer 'a' and 'A' are one token; keep one"):
        base_model.add_tokens(tokenizer, ["a", "A"])


def test_a_token_that_the_tokenizer_has_and_the_model_has_no_row_for_is_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = base_model.load_tokenizer(folder, Model(name_or_path=str(folder)))
    tokenizer.add_tokens([f"<extra{number}>" for number in range(512 - LENGTH)] + ["<pad>"])
    tokenizer.save_pretrained(folder)
    section, checkpoint = with_tokens(folder, ["<call>"])
    with pytest.raises(
        InputError, match=r"the model has 512 embeddings, .*\('<pad>'\); list these in model.new_tokens"
    ):
        base_model.load_config(checkpoint, section)
    section, checkpoint = with_tokens(folder, ["<call>", "<pad>"])
    assert base_model.load_config(checkpoint, section).vocab_size == 514
    assert checkpoint.added == {513}
