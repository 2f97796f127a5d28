"""A model folder, local or of the hub: found, read and refused before a weight is."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..system import adapter_files, files
from ..system.errors import InputError
from ..system.storage import sha256
from . import file_hashes, multimodal, renamed
from .messages import said
from .new_tokens import add_tokens
from .tasks import GENERATION, Task
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class Checkpoint:
    """A model folder on disk whose safetensors headers have been read and found whole.

    files: {tensor name: file name}. revision: the hub commit, or None for a local folder.
    new_tokens: {token: id} of model.new_tokens; added: those ids that the folder's own tokenizer does not have. task: what it
    is opened for.
    """

    name_or_path: str
    folder: Path
    revision: str | None
    files: dict = field(repr=False)
    new_tokens: dict = field(default_factory=dict)
    added: frozenset = frozenset()
    task: Task = GENERATION
    _read: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def facts(self, fully=False):
        """Return {weight file: file_hashes.Facts}. What this object has not read, and no process remembers, is read.

        fully: the files are read, whatever is remembered; once for each object.
        """
        names = sorted(set(self.files.values()))
        known = {} if fully else {name: file_hashes.remembered(self.folder / name) for name in names}
        known |= self._read
        missing = {self.folder / name: name for name in names if known.get(name) is None}
        self._read.update((missing[path], facts) for path, facts in file_hashes.read(list(missing)).items())
        return {name: self._read.get(name) or known[name] for name in names}

    def file_hashes(self, fully=False):
        """Return {file name: sha256} of config.json and the weight files; fully: see `facts`."""
        weights = {name: facts.sha256 for name, facts in self.facts(fully).items()}
        return {"config.json": sha256(self.folder / "config.json"), **weights}

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
        if self.half:
            return self.half.names
        return renamed.names_in_files(self) if self.task.file.HAS_CLASSES else {name: name for name in self.files}

    def in_files(self, name, prefix):
        """Return the name in the files of parameter `name` of the text model, None if it is not there.

        prefix: the model's base_model_prefix, see `spellings`.
        """
        return next((self.text_tensors[one] for one in spellings(name, prefix) if one in self.text_tensors), None)

    def tensor(self, name):
        """Return tensor `name` of the files, mapped, not copied: its pages are the page cache's."""
        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)

    def shapes(self):
        """Return {tensor name: shape} from the headers, without reading weights."""
        shapes = {}
        for name in sorted(set(self.files.values())):
            with safe_open(self.folder / name, "pt") as file:
                shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return shapes


def spellings(name, prefix):
    """Return the names that a tensor may have: GPT-2's files leave out `prefix`, the model's base_model_prefix."""
    return name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"


def find(section, weights=True, task=GENERATION):
    """Return the Checkpoint of recipe section `model`: a local folder, or a hub name (downloaded if need be).

    weights: False if config and tokenizer will do: no weights are downloaded or looked at, and `files` is empty. task: what the
    model is opened for.

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
        return Checkpoint(section.name_or_path, folder, revision, tensors, task=task)
    tokenizer = load_tokenizer(folder, section)
    known = set(tokenizer.get_vocab().values())
    new_tokens = add_tokens(tokenizer, section.new_tokens)
    added = frozenset(new_tokens.values()) - known
    return Checkpoint(section.name_or_path, folder, revision, tensors, new_tokens, added, task)


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
    adapter = folder / adapter_files.CONFIG
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
        keys = tensor_names(folder / name)
        twice = sorted(found.keys() & set(keys))
        if twice:
            raise InputError(
                f"{folder}: {twice[0]} is both in {found[twice[0]]} and in {name}; download the model again"
            )
        found |= dict.fromkeys(keys, name)
    return found


def tensor_names(path):
    """Return the names of the tensors in a safetensors file; raises InputError unless it is whole."""
    files.refuse_instead(path)
    try:
        with safe_open(path, "pt") as file:
            return file.keys()
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}); copy or download it again") from None
