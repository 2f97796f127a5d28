"""A model folder, local or of the hub: found, read and refused before a weight is."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..system import files
from ..system.errors import InputError
from ..system.storage import sha256
from . import multimodal, prequantized


@dataclass(frozen=True)
class Checkpoint:
    """A model folder on disk whose safetensors headers have been read and found whole.

    files: {tensor name: file name}. revision: the hub commit, or None for a local folder.
    new_tokens: {token: id} of model.new_tokens; added: those ids that the folder's own tokenizer does not have.
    """

    name_or_path: str
    folder: Path
    revision: str | None
    files: dict = field(repr=False)
    new_tokens: dict = field(default_factory=dict)
    added: frozenset = frozenset()

    def file_hashes(self):
        """Return {file name: sha256} of config.json and the weight files."""
        names = sorted(set(self.files.values()))
        return {name: sha256(self.folder / name) for name in ["config.json", *names]}

    def generation_config(self):
        """Return what generation_config.json holds, or None where there is none."""
        from transformers import GenerationConfig

        path = self.folder / "generation_config.json"
        try:
            return GenerationConfig.from_pretrained(self.folder) if path.is_file() else None
        except (ValueError, TypeError, AttributeError, OSError) as error:
            raise InputError(f"{path}: {said(error)}") from None

    @cached_property
    def half(self):
        """The multimodal.Half of the files, None of a text-only checkpoint."""
        return multimodal.half_of(self)

    @cached_property
    def text_tensors(self):
        """{tensor of the text model: its name in the files}, which are one in a text-only checkpoint."""
        return self.half.names if self.half else {name: name for name in self.files}

    def in_files(self, name, prefix):
        """Return the name in the files of parameter `name` of the text model, None if it is not there.

        prefix: the model's base_model_prefix, which GPT-2's files leave out.
        """
        names = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((self.text_tensors[one] for one in names if one in self.text_tensors), None)

    def shapes(self):
        """Return {tensor name: shape} from the headers, without reading weights."""
        shapes = {}
        for name in sorted(set(self.files.values())):
            with safe_open(self.folder / name, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes


def find(section, weights=True):
    """Return the Checkpoint of recipe section `model`: a local folder, or a hub name (downloaded if need be).

    weights: False if config and tokenizer will do: no weights are downloaded or looked at, and `files` is empty.

    Raises:
        InputError: no such folder or repository, no safetensors, an unsafe index, or a corrupt file.
    """
    folder, revision = Path(section.name_or_path), None
    if folder.is_file():
        raise InputError(f"model.name_or_path {folder}: is a file; give the model folder")
    folder = _snapshot(folder)
    if not folder.is_dir():
        folder, revision = _download(section, weights)
    elif section.revision is not None:
        raise InputError(f"model.revision {section.revision}: {folder} is a local folder, which has no revisions")
    _refuse_folder(folder)
    tensors = weight_files(folder) if weights else {}
    if not section.new_tokens:
        return Checkpoint(section.name_or_path, folder, revision, tensors)
    tokenizer = load_tokenizer(folder, section)
    known = set(tokenizer.get_vocab().values())
    new_tokens = add_tokens(tokenizer, section.new_tokens)
    added = frozenset(new_tokens.values()) - known
    return Checkpoint(section.name_or_path, folder, revision, tensors, new_tokens, added)


def _snapshot(folder):
    """Return the snapshot in `folder` where that is a repository in the hub's cache (models--OWNER--NAME), else `folder`.

    Raises:
        InputError: it has several snapshots, or none.
    """
    snapshots = folder / "snapshots"
    if not snapshots.is_dir() or (folder / "config.json").is_file():
        return folder
    found = sorted(path for path in snapshots.iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if len(found) > 1 and main.is_file():
        newest = main.read_text(encoding="utf-8").strip()
        found = [path for path in found if path.name == newest] or found
    if len(found) != 1:
        listed = "".join(f"\n  {path}" for path in found)
        raise InputError(
            f"model.name_or_path {folder}: is a repository in the hub's cache; "
            + (f"give one of its {len(found)} snapshots:{listed}" if found else "it has no snapshot; download it again")
        )
    return found[0]


# Sizes that every architecture has under one of these names, and what none exceeds: building a model of more would take
# all time and memory before its weights could disagree.
_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 1000),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 2**16),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 2**24),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions"), 2**28),
}


def _refuse_folder(folder):
    """Raise InputError unless the folder is that of one model, whose small files can be read."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        trained_on = files.read_object(adapter).get("base_model_name_or_path")
        what = "there is an adapter in it" if (folder / "config.json").is_file() else "is an adapter, not a model"
        raise InputError(
            f"model.name_or_path {folder}: {what} ({adapter.name}); give the model that it was trained on"
            f"{f' ({trained_on})' if trained_on else ''}; "
            f"`qlora export {shlex.quote(str(folder))} --model MODEL` merges the two"
        )
    if not (folder / "config.json").is_file():
        raise InputError(f"model.name_or_path {folder}: no config.json; not a model folder")
    config = files.read_object(folder / "config.json")
    problems = _absurd(config)
    if problems:
        raise InputError.listing(folder / "config.json", problems, "fix it or download it again")
    for name, value in config.items():
        if name.endswith("_implementation") and re.search(r"[/\\:@]", str(value)):
            raise InputError(
                f"{folder / 'config.json'}: {name} {value!r} names code on the hub, which transformers would get and run; "
                "take it out of the file (recipes have model.attn_implementation)"
            )
    refuse_generation(folder)


def refuse_generation(folder):
    """Raise InputError if the folder has a generation_config.json that does not say which tokens end an answer."""
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = files.read_object(generation).get("eos_token_id")
        listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
        if not all(type(one) is int and one >= 0 for one in listed):
            raise InputError(f"{generation}: eos_token_id {ends!r} is neither a token id nor a list of them")


def _absurd(config):
    """Return in words what is wrong with the sizes in a config, those of the text part of a larger model too."""
    parts = [config, *(part for part in (config.get("text_config"),) if isinstance(part, dict))]
    return [
        f"{name}: {part[name]!r} is not a whole number from 1 to {most:,}"
        for part in parts
        for name, most in _SIZES.items()
        if part.get(name) is not None and not (type(part[name]) is int and 1 <= part[name] <= most)
    ]


def _download(section, weights):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = section.name_or_path
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_like_path:
        raise InputError(f"model.name_or_path {name}: no such folder, and not a hub name (OWNER/NAME)")
    try:
        wanted = [
            *(["*.safetensors"] if weights else []),
            "*.json",
            "*.jinja",
            "*.model",
            "*.txt",
            *(["*.py"] if section.trust_remote_code else []),
        ]
        unwanted = ["*/*", "consolidated*"]  # second copies of the weights, in other layouts
        found = snapshot_download(name, revision=section.revision, allow_patterns=wanted, ignore_patterns=unwanted)
        folder = Path(found)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"model.name_or_path {name}: no such folder, and the hub says: {said(error)}") from None
    return folder, folder.name


def weight_files(folder):
    """Return {tensor name: file name} of the safetensors in `folder`; raises InputError unless they are whole."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        names = [single.name]
    elif index.is_file():
        listed = files.read_object(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise InputError(f"{index}: its weight_map is not {{tensor: file name}}; download the model again")
        names = sorted(set(listed.values()))
        # transformers joins these names unchecked: "../x" and absolute paths would be read
        unsafe = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
        if unsafe:
            raise InputError(
                f"{index}: {unsafe[0]!r} is not a plain safetensors file name; the folder cannot be trusted"
            )
    else:
        raise InputError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json (pickled weights are not read; take a "
            "copy or a revision in safetensors)"
        )
    found: dict = {}
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is listed in {index.name} but missing; download the model again")
        files.refuse_instead(folder / name)
        try:
            with safe_open(folder / name, "pt") as file:
                keys = file.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{folder / name} is not a complete safetensors file ({error}); download it again"
            ) from None
        twice = sorted(found.keys() & set(keys))
        if twice:
            raise InputError(
                f"{folder}: {twice[0]} is both in {found[twice[0]]} and in {name}; download the model again"
            )
        found |= dict.fromkeys(keys, name)
    return found


def load_config(checkpoint, section):
    """Return the transformers config, its vocab_size grown to hold the checkpoint's new tokens.

    Raises:
        InputError: not a known causal language model in 16 or 32 bit or NF4; or rows would have to be made up for tokens
            that are not trained.
    """
    config = read_config(checkpoint, section)
    if checkpoint.new_tokens:
        text_config, ids = config.get_text_config(), set(checkpoint.new_tokens.values())
        needed = set(range(text_config.vocab_size, max(ids) + 1))
        if needed - ids:
            raise InputError(
                f"{checkpoint.folder}: the model has {text_config.vocab_size} embeddings, and its tokenizer has tokens "
                f"beyond them ({_names(checkpoint, section, needed - ids)}); list these in model.new_tokens too"
            )
        text_config.vocab_size += len(needed)
    return config


def _names(checkpoint, section, ids):
    tokens = load_tokenizer(checkpoint.folder, section).convert_ids_to_tokens(sorted(ids)[:5])
    return ", ".join(map(repr, tokens)) + (", ..." if len(ids) > 5 else "")


def read_config(checkpoint, section):
    """Return the transformers config as the files have it, of a multimodal model that of its text half.

    Raises:
        InputError: as `load_config` does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:  # its class computes with what the file says, and divides by zero heads
        raise InputError(f"{path}: {said(error)}") from None
    text_half = multimodal.text_config(config, checkpoint.folder)
    if text_half is not None:
        return text_half
    known = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in getattr(
        config, "auto_map", {}
    )
    if not known:
        raise InputError(f"{checkpoint.folder / 'config.json'}: {config.model_type!r} is not a causal language model")
    prequantized.refuse_unsupported(config, path)
    return config


_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


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
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _refuse_without_reader(folder):
    """Raise InputError where the tokenizer is a SentencePiece model only and the package that reads it is missing.

    transformers 5 then takes the file for one of tiktoken's, and asks for that.
    """
    models = [path for path in sorted(folder.glob("*.model")) if path.name in _SENTENCEPIECE_FILES]
    if models and not (folder / "tokenizer.json").is_file() and find_spec("sentencepiece") is None:
        raise InputError(
            f"{folder}: the tokenizer is a SentencePiece model ({models[0].name}, and no tokenizer.json); install what reads "
            "it:  pip install 'qlora-trainer[sentencepiece]'"
        )


def add_tokens(tokenizer, tokens, template=None):
    """Return {token: id} of `tokens` (None: no tokens), after adding to `tokenizer` those that are not one token there.

    An added token that stands in the chat template (`template`, or the tokenizer's own) is special, which decoded answers
    leave out; the others they keep.

    Raises:
        InputError: two of them are the same token to this tokenizer.
    """
    from transformers import AddedToken

    template, ids = template or str(tokenizer.chat_template or ""), {}
    for token in tokens or ():
        found = tokenizer(token, add_special_tokens=False).input_ids
        if len(found) != 1 or (found[0] == tokenizer.unk_token_id and token != tokenizer.unk_token):
            special = token in template
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)], special_tokens=special)
            found = [tokenizer.convert_tokens_to_ids(token)]
        same = next((other for other, number in ids.items() if number == found[0]), None)
        if same is not None:
            raise InputError(f"model.new_tokens: to this tokenizer {same!r} and {token!r} are one token; keep one")
        ids[token] = found[0]
    return ids


def said(error):
    """Return what a library says of a file in a model folder, in one line."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it needs code that comes with the model, which is not run; if you have read that code and trust it, set "
            "model.trust_remote_code=true"
        )
    lines = [line.strip() for line in text.splitlines()]
    if not lines or isinstance(error, (KeyError, AttributeError, ZeroDivisionError, RecursionError)):
        return f"a required setting is missing or wrong ({type(error).__name__}: {text})"
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
