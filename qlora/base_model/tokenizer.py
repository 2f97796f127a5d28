"""The tokenizer of a model folder: read, and refused where no loss mask could be placed with it."""

from __future__ import annotations

import functools
from importlib.util import find_spec

from ..system import files
from ..system.errors import InputError
from ..system.extras import how_to_install
from ..system.storage import write_json
from .messages import said

_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_TEXTS = (
    "How are you? 2023, and 650841823.",
    "  for x in range(10):\n\tprint(x)\n\n",
    "Grüße! don't, l'été",
    "你好,世界 🙂",
)


def load_tokenizer(folder, section):
    """Return the tokenizer in `folder`, with a pad token; raises InputError where there is none.

    Pads are masked by position, never by id, so that pad == end token cannot hide the end of a turn.
    """
    from transformers import AutoTokenizer

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            files.read_object(folder / name)
    for template in sorted(folder.glob("*.jinja")):
        files.refuse_instead(template)
    _refuse_without_reader(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # the Rust library raises Exception itself
        if (folder / "tokenizer.json").is_file():
            files.read_object(folder / "tokenizer.json")
        raise InputError(f"{folder}: no usable tokenizer: {said(error)}") from None
    of_processor = folder / "chat_template.json"  # where older multimodal models have their template
    if tokenizer.chat_template is None and of_processor.is_file():
        tokenizer.chat_template = files.read_object(of_processor).get("chat_template")
    for name, kinds in (("chat_template", (str, dict, type(None))), ("model_max_length", (int, float))):
        if not isinstance(getattr(tokenizer, name), kinds):
            raise InputError(f"{folder / 'tokenizer_config.json'}: {name} cannot be {getattr(tokenizer, name)!r}")
    if not tokenizer.is_fast:
        raise InputError(f"{folder}: the tokenizer has no tokenizer.json, so the loss mask cannot be placed")
    if tokenizer.pad_token is None or _has_no_row(tokenizer.pad_token_id, folder):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Write a tokenizer and its chat template into `folder`, for transformers 4 as well."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = tokenizer_settings(files.read_object(path))
    for name in ("is_local", "local_files_only"):  # of this machine
        settings.pop(name, None)
    write_json(path, settings)


def tokenizer_settings(settings):
    """Return the settings of tokenizer_config.json without the class and the list that transformers 4 stops at."""
    settings = dict(settings)
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def follows_its_file(folder, tokenizer, new_tokens=()):
    """Return whether `tokenizer`, loaded from `folder`, makes the tokens that its tokenizer.json says; True where there is none.

    new_tokens: what was added to it since.

    transformers 5 builds some tokenizers anew by their class, with the vocabulary of the file alone
    (huggingface/transformers#45920, #48206); version 4, vLLM and llama.cpp take the file as it is.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return True
    stat = path.stat()
    by_file = _ids_by_file(path.resolve(), stat.st_size, stat.st_mtime_ns)
    kept = [
        (text, ids) for text, ids in zip(_TEXTS, by_file, strict=True) if not any(token in text for token in new_tokens)
    ]
    return all(tokenizer(text, add_special_tokens=False).input_ids == ids for text, ids in kept)


@functools.lru_cache(maxsize=16)
def _ids_by_file(path, num_bytes, mtime_ns):
    """Return the ids of _TEXTS by a tokenizer.json. To parse it takes 0.1 s a MB, and a comparison asks of each training;
    num_bytes, mtime_ns: another file is asked anew."""
    from tokenizers import Tokenizer

    written = Tokenizer.from_file(str(path))
    written.no_truncation()
    return [written.encode(text, add_special_tokens=False).ids for text in _TEXTS]


def _has_no_row(token_id, folder):
    """Return whether the embedding of the model in `folder`, if there is one, has no row for a token: padding with it would end
    the process. Llama 2 and others got such pad tokens beside their vocabulary."""
    config = files.read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    part = config.get("text_config")
    rows = (part if isinstance(part, dict) else config).get("vocab_size")
    return isinstance(rows, int) and token_id >= rows


def _refuse_without_reader(folder):
    """Raise InputError where the tokenizer is a SentencePiece model only and the package that reads it is missing.

    transformers 5 then takes the file for one of tiktoken's, and asks for that.
    """
    models = [path for path in sorted(folder.glob("*.model")) if path.name in _SENTENCEPIECE_FILES]
    if models and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise InputError(
            f"{folder}: the tokenizer is a SentencePiece model ({models[0].name}, and no tokenizer.json); install what reads "
            f"it:  {how_to_install('sentencepiece')}"
        )
