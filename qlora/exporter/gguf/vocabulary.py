"""A fast tokenizer -> the vocabulary of a GGUF file, or a refusal: llama.cpp tokenizes by its own code, chosen by name.

Byte-level BPE is written as llama.cpp's "gpt2" with the name of the regular expression that tokenizer.json has; BPE over
characters with byte fallback (what SentencePiece models become in tokenizer.json) as its "llama", which merges by score.
Anything else is refused, since llama.cpp would tokenize it, only otherwise. Read against llama.cpp of llama-cpp-python
0.3.36, src/llama-vocab.cpp. Text is not normalised there (NFC, which Qwen's tokenizer applies, changes composed text only).
"""

from __future__ import annotations

import json
import re

from ...data import chat
from ...system.errors import InputError

_LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")

# (how text is cut before merging, does a whole word in the vocabulary go before merges?) -> llama.cpp's name for it
_PRE_TOKENIZERS = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", _LLAMA_3), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", _LLAMA_3), ("ByteLevel", False)), False): "smaug-bpe",
    ((("Split", _QWEN_2), ("ByteLevel", False)), False): "qwen2",
}

# llama.cpp ends an answer at tokens of these names, whatever the file says
_ENDS_BY_NAME = set(
    "<|eot_id|> <|im_end|> <|end|> <end_of_turn> <|endoftext|> </s> <|eom_id|> <EOT> [EOT] [EOS] <|end_of_text|> <eos> "
    "<end_of_utterance> <｜end▁of▁sentence｜>".split()
)
_SPACE = "▁"  # how SentencePiece writes a space


def adds_bos(tokenizer):
    """True if the start token has to be put before a prompt by the server, because training saw it there.

    A chat template that begins with it says so; where it does not, training saw none, whatever the tokenizer adds to
    other text. A start token that the tokenizer does not add of itself (SmolLM2's <|im_start|>, which opens every turn)
    is the template's to write.
    """
    adds = chat.adds_bos(tokenizer)
    if not adds or not tokenizer.chat_template:
        return adds
    return chat.render(tokenizer, [{"role": "user", "content": "x"}], True).startswith(tokenizer.bos_token)


def add(writer, tokenizer, vocab_size, stops):
    """Add vocabulary, special tokens and chat template to a gguf.GGUFWriter; return the general.name that llama.cpp needs
    to see, or None.

    vocab_size: rows of the embedding; those beyond the tokenizer become unused tokens. stops: ids that end an answer.

    Raises:
        InputError: llama.cpp would tokenize otherwise than this tokenizer, or not stop where this model stops.
    """
    import gguf

    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = data["model"], {token["id"]: token for token in data["added_tokens"]}
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        _refuse(f"its model is {model['type']}, and only BPE can be converted")
    if model.get("dropout"):
        _refuse("it has dropout")
    if any(token["single_word"] or token["lstrip"] for token in added.values()):
        _refuse("an added token strips the white space before it (lstrip), or matches whole words only (single_word)")
    words = {number: word for word, number in model["vocab"].items()} | {i: one["content"] for i, one in added.items()}
    if max(words) >= vocab_size:
        _refuse(f"it has a token {max(words)}, but the model has only {vocab_size} embeddings")

    spelled = _byte_level if _is_byte_level(data) else _sentencepiece
    kinds, scores = spelled(writer, data, tokenizer, words)
    for number, token in added.items():
        if not token["special"] and _SPACE in token["content"] and spelled is _sentencepiece:
            continue  # runs of spaces, which merge like any word
        kinds[number] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    if spelled is _sentencepiece and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    tokens = [words.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    if len(set(tokens)) < vocab_size or not all(tokens):
        _refuse("two tokens have the same text, or a token is empty")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in range(vocab_size)])
    if scores is not None:
        writer.add_token_scores([scores.get(number, -1e6) for number in range(vocab_size)])
    _add_special(writer, tokenizer, stops)
    if isinstance(tokenizer.chat_template, dict):
        writer.add_chat_template([{"name": name, "template": one} for name, one in tokenizer.chat_template.items()])
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
    return _name_for_stripping(added)


def _refuse(what):
    raise InputError(
        f"tokenizer.json: {what}; llama.cpp would tokenize differently. Set LLAMA_CPP to the folder of llama.cpp, whose own "
        "convert_hf_to_gguf.py is then used, or serve the exported folder with vLLM"
    )


def _is_byte_level(data):
    return "ByteLevel" in json.dumps(data["pre_tokenizer"])


def _byte_level(writer, data, tokenizer, words):
    """Add what only byte-level BPE has; return ({id: type}, None: no scores)."""
    import gguf

    model, normalizer = data["model"], data["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        _refuse(f"it uses the normalizer {normalizer['type']}")
    parts = tuple(_part(part) for part in _sequence(data["pre_tokenizer"], "pretokenizers"))
    name = _PRE_TOKENIZERS.get((parts, bool(model.get("ignore_merges"))))
    if name is None or model.get("byte_fallback"):
        _refuse(f"llama.cpp does not know its pre-tokenizer ({parts})")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    return dict.fromkeys(words, gguf.TokenType.NORMAL), None


def _sequence(value, key):
    return value[key] if value and value["type"] == "Sequence" else [value] if value else []


def _part(part):
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return "ByteLevel", part["use_regex"]
    if part["type"] == "Digits":
        return "Digits", part["individual_digits"]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return "Split", part["pattern"].get("Regex")
    return part["type"], json.dumps(part)


def _sentencepiece(writer, data, tokenizer, words):
    """Add what only character BPE with byte fallback has; return ({id: type}, {id: score}).

    llama.cpp joins the two neighbours whose joint piece has the highest score, where tokenizer.json joins the pair that
    comes first in its list of merges. These are the same if the list holds every pair that makes a piece, ordered by
    piece; the score is then minus the piece's place in the list.
    """
    import gguf

    model = data["model"]
    bytes_ = {f"<0x{value:02X}>" for value in range(256)}
    if not model.get("byte_fallback") or not bytes_ <= model["vocab"].keys() or model.get("ignore_merges"):
        _refuse("it is not byte-level, and has no token for every byte")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(_prefixes_space(data, tokenizer))

    vocab, kinds, scores = model["vocab"], {}, {}
    for word, number in vocab.items():
        kinds[number] = gguf.TokenType.BYTE if word in bytes_ else gguf.TokenType.NORMAL
    pairs = {tuple(pair.split(" ") if isinstance(pair, str) else pair): None for pair in model["merges"]}
    previous = None
    for left, right in pairs:
        piece = left + right
        if piece != previous and vocab[piece] in scores:
            _refuse(f"its merges are not ordered by piece ({piece!r} comes twice)")
        scores.setdefault(vocab[piece], -float(len(scores)))
        previous = piece
    special = {token["content"] for token in data["added_tokens"] if token["special"]}
    for word, number in vocab.items():
        if len(word) < 2 or word in special or word in bytes_:
            continue
        for at in range(1, len(word)):
            left, right = word[:at], word[at:]
            if left in vocab and right in vocab and (left, right) not in pairs:
                _refuse(f"it never joins {left!r} and {right!r}")
        if number not in scores and _SPACE in word and words[number] == word:
            scores[number] = -1e6
    for token in data["added_tokens"]:
        if token["normalized"] and (_SPACE in token["content"] or " " in token["content"]):
            _refuse(f"its token {token['content']!r} is matched in normalized text")
        if not token["special"] and _SPACE in token["content"] and token["id"] not in scores:
            _refuse(f"its token {token['content']!r} cannot be built by merges")
    return kinds, scores


def _prefixes_space(data, tokenizer):
    """True if a space is put before every piece of text between special tokens, False if before none."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    normalizers, pre = _sequence(data["normalizer"], "normalizers"), data["pre_tokenizer"]
    nothing_to_split = pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})
    if normalizers in ([prepend, replace], [replace]) and nothing_to_split:
        return prepend in normalizers
    if not normalizers and pre and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and not pre["split"]:
        scheme = pre["prepend_scheme"]
        if scheme == "never":
            return False
        # There it is before every piece or none. Here: before every piece ("always"), or the text's first ("first"),
        # if no space is there yet. Which of these a prompt has lies with the chat template.
        prefixed = {
            not piece.startswith(" ") and (scheme == "always" or at == 0)
            for at, piece in _pieces(tokenizer, [token["content"] for token in data["added_tokens"]])
        }
        if len(prefixed) == 1:
            return prefixed.pop()
    return _refuse("llama.cpp cannot add spaces before words as it does")


def _pieces(tokenizer, added):
    """Return [(position, text)] of what stands between added tokens in chat prompts."""
    if not tokenizer.chat_template:
        return [(0, "x")]
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    pieces = []
    for messages in (turns[:1], turns):
        at = 0
        for piece in re.split(f"({'|'.join(map(re.escape, added))})", chat.render(tokenizer, messages, True)):
            if piece and piece not in added:
                pieces.append((at, piece))
            at += len(piece)
    return pieces


def _add_special(writer, tokenizer, stops):
    if tokenizer.eos_token_id is None and not stops:
        _refuse("it has no end token; llama.cpp would use token 11")
    if tokenizer.bos_token_id is None and tokenizer.chat_template:
        turns = [{"role": "user", "content": "x"}]
        if "\ue000" in chat.render(tokenizer, turns, bos_token="\ue000"):
            _refuse("the chat template uses a start token, but the tokenizer has none; llama.cpp would use token 11")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id in stops or not stops else min(stops)
    names = dict(zip(stops, tokenizer.convert_ids_to_tokens(list(stops)), strict=True))
    others = sorted(set(stops) - {eos}, key=lambda stop: (names[stop] in _ENDS_BY_NAME, stop))
    beyond = [names[stop] for stop in others[2:] if names[stop] not in _ENDS_BY_NAME]
    if beyond:
        _refuse(f"it has more stop tokens than a GGUF file can hold ({', '.join(beyond)})")
    writer.add_eos_token_id(eos)
    for token, add_token in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add_token(token)
    for number, add_token in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            add_token(number)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(False)  # a prompt goes on


def _name_for_stripping(added):
    """Return "phi-3" where added tokens take the white space after them along: llama.cpp knows that by the model's name,
    and for exactly these tokens. Any other name is left out: by some it treats tokens in ways of its own."""
    strips = {token["content"] for token in added.values() if token["rstrip"]}
    if not strips:
        return None
    all_added = {token["content"] for token in added.values()}
    plain = {"<unk>", "<s>", "<|endoftext|>"}
    if not plain | {"</s>"} <= all_added or strips != all_added - plain:
        _refuse(f"its token {min(strips)!r} strips the white space after it (rstrip)")
    return "phi-3"
