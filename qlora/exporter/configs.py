"""The small files of an export: the base's own config and tokenizer files, with what the merge changed and nothing else.

Files that transformers 5 writes anew are misread by version 4: rope_parameters alone means rope_theta 10000 there,
without a word. So the base's own files are kept, and where a field has an old and a new spelling both are written.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

from .. import base_model
from ..data import chat
from ..system import files
from ..system.errors import ProofFailed
from ..system.storage import write_json
from .proof import text_rows

# of a tokenizer: what may lie in a model's folder
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*.model", "vocab.*", "merges.txt",
                   "*.tiktoken", "chat_template*", "additional_chat_templates/*.jinja")  # fmt: skip
_TEMPLATE_FILES = ("chat_template", "additional_chat_templates")
_NOT_OF_THE_MODEL = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "auto_map"}
_HAS_LOCAL_ROPE = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
# what version 4 calls (theta, partial_rotary_factor), where not so
_ROPE_NAMES = dict.fromkeys(("gpt_neox", "gpt_neox_japanese"), ("rotary_emb_base", "rotary_pct"))
_ROPE_TYPES = {
    "default",
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "llama3",
}  # version 4's; a family with another is newer
_COUNTS_EXPERTS = ("qwen3_moe", "qwen3_vl_moe_text")  # version 4 reads num_experts alone, 128 where it is missing


def write(folder, checkpoint, section, config, tokenizer, dtype, generation=None):
    """Write config.json, generation_config.json, tokenizer files and remote code into `folder`.

    checkpoint, section: the base and the recipe's section `model`. config, tokenizer: of the merged model. dtype: its
    name. generation: a Checkpoint whose folder has the generation_config.json to write; by default the base.

    Raises:
        ProofFailed: what was written does not read as config and tokenizer of the merged model.
    """
    before, after = _as_dict(base_model.read_config(checkpoint, section)), _as_dict(config)
    path = checkpoint.folder / "config.json"
    raw = files.read_object(path)
    is_multimodal = base_model.whole_config(checkpoint.folder) is not None
    changed = model_config_of_whole if is_multimodal else model_config
    task = checkpoint.task.file
    _write_or_copy(folder / path.name, changed(raw, before, after, dtype) | task.written_to_config(config), path)
    if not task.HAS_CLASSES:
        _write_generation_config(folder, generation or checkpoint, config, tokenizer)
    if not task.HAS_TOKENS:
        shutil.copyfile(checkpoint.folder / base_model.image_processor.FILE, folder / base_model.image_processor.FILE)
    else:
        _write_tokenizer(folder, checkpoint.folder, base_model.load_tokenizer(checkpoint.folder, section), tokenizer)
    if (
        task.HAS_CLASSES and task.HAS_TOKENS
    ):  # rows of unlike length go together in a pipeline, whatever the base's own files say
        path = folder / "tokenizer_config.json"
        write_json(path, files.read_object(path) | {"pad_token": str(tokenizer.pad_token)})
    for source in checkpoint.folder.glob("*processor_config.json") if is_multimodal else ():
        shutil.copyfile(source, folder / source.name)
    has_code = [path for path in folder.glob("*config.json") if files.read_object(path).get("auto_map")]
    for code in checkpoint.folder.glob("*.py") if has_code else []:
        shutil.copy(code, folder)
    refuse_misread(folder, section, config, tokenizer, checkpoint.task)


def model_config(raw, before, after, dtype):
    """Return config.json of a merged model.

    raw: the base's config.json. before, after: all settings of the base and of the merged model, as transformers reads
    them; what differs is what the merge changed.
    """
    result = _changed(raw, before, after)
    result.pop("quantization_config", None)
    result |= {"dtype": dtype, "torch_dtype": dtype}
    for part, settings in ((result, after), (result.get("text_config"), after.get("text_config"))):
        if isinstance(part, dict) and isinstance(settings, dict):
            part |= {name: dtype for name in ("dtype", "torch_dtype") if name in part}
            part |= {name: value for name, value in _older_spellings(settings).items() if name not in part}
    return result


def model_config_of_whole(raw, before, after, dtype):
    """Return config.json of a multimodal model whose text half was merged: the base's, but for what the merge changed.

    before, after: all settings of the text half.
    """
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), dtype)
    nested = isinstance(raw.get("text_config"), dict)  # Qwen2-VL's files have the text's settings at the top
    text = _changed(raw["text_config"] if nested else raw, before, after)
    text |= {name: value for name, value in dtypes.items() if name in text}
    if "rope_parameters" in text:  # version 5 wrote it
        older = _older_spellings(after) | {
            "tie_word_embeddings": after["tie_word_embeddings"]
        }  # 4 ties by the text's own
        text |= {name: value for name, value in older.items() if name not in text}
    result = raw | {"text_config": text} if nested else text
    if before["tie_word_embeddings"] != after["tie_word_embeddings"]:
        result["tie_word_embeddings"] = after["tie_word_embeddings"]
    there = {name: value for name, value in dtypes.items() if name in result}
    return result | (there or dtypes)


def _as_dict(config):
    return json.loads(type(config).from_dict(config.to_dict()).to_json_string(use_diff=False))


def _changed(raw, before, after):
    result = dict(raw)
    for name, value in after.items():
        if name in _NOT_OF_THE_MODEL or before.get(name) == value:
            continue
        if isinstance(value, dict) and isinstance(raw.get(name), dict):
            value = _changed(raw[name], before.get(name) or {}, value)
        result[name] = value
    return result


def _older_spellings(settings):
    """Return what is spelled otherwise in version 4, in both spellings: rope_parameters, and what was read before it."""
    model_type, found = settings.get("model_type"), {}
    if model_type in _COUNTS_EXPERTS:
        found["num_experts"] = settings["num_local_experts"]
    rope = settings.get("rope_parameters")
    if not rope:
        return found
    found["rope_parameters"] = rope
    if "rope_type" not in rope:  # by kind of layer
        found |= _by_kind_of_layer(model_type, rope, settings.get("layer_types") or [])
        rope = rope.get("full_attention") or {}
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        return {"rope_parameters": found["rope_parameters"]}  # Gemma 4 refuses rope_scaling beside it
    theta, partial = _ROPE_NAMES.get(model_type, ("rope_theta", "partial_rotary_factor"))
    scaling = dict(rope)
    old = {name: scaling.pop(new, None) for name, new in ((theta, "rope_theta"), (partial, "partial_rotary_factor"))}
    found |= {name: value for name, value in old.items() if value is not None}
    # of a rope_type default too, where there is more: mrope_section
    found["rope_scaling"] = None if scaling in ({}, {"rope_type": "default"}) else scaling
    return found


def _by_kind_of_layer(model_type, rope, layer_types):
    """Return what version 4 calls rotary settings of layers that see everything, or a window of it."""
    of_all, local = (rope.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if model_type in _HAS_LOCAL_ROPE and "rope_theta" in local:
        return {"rope_local_base_freq": local["rope_theta"]}
    if model_type == "modernbert":
        apart = layer_types.index("full_attention", 1) if "full_attention" in layer_types[1:] else len(layer_types)
        thetas = {"global_rope_theta": of_all.get("rope_theta"), "local_rope_theta": local.get("rope_theta")}
        return {name: value for name, value in thetas.items() if value} | {"global_attn_every_n_layers": apart}
    return {}


def _write_generation_config(folder, checkpoint, config, tokenizer):
    from transformers import GenerationConfig

    path = checkpoint.folder / "generation_config.json"
    generation = checkpoint.generation_config() or GenerationConfig.from_model_config(config)
    # not save_pretrained: it refuses sampling settings beside do_sample: false, which published models have
    values = files.read_object(path) if path.is_file() else generation.to_diff_dict()
    ends, listed = chat.stop_token_ids(tokenizer, generation), values.get("eos_token_id")
    if set(listed if isinstance(listed, list) else [listed]) != set(ends):
        values["eos_token_id"] = sorted(ends)
    if tokenizer.pad_token_id is not None:
        values["pad_token_id"] = tokenizer.pad_token_id
    _write_or_copy(folder / path.name, values, path)


def _write_or_copy(path, values, source):
    """Write `values` as JSON, or copy the file that says the same byte for byte."""
    if source.is_file() and files.read_object(source) == values:
        shutil.copyfile(source, path)
    else:
        write_json(path, values)


def _write_tokenizer(folder, base_folder, before, tokenizer):
    """Write the tokenizer: the base's own files, and in them what differs between `before`, the base's, and `tokenizer`."""
    old, new = _backend(before), _backend(tokenizer)
    if any(old.get(part) != new.get(part) for part in (old | new).keys() - {"added_tokens"}):
        base_model.save_tokenizer(tokenizer, folder)  # another tokenizer
        return
    same_template = before.chat_template == tokenizer.chat_template
    for source in sorted({path for pattern in TOKENIZER_FILES for path in base_folder.glob(pattern)}):
        name = source.relative_to(base_folder)
        if source.is_file() and (same_template or not name.parts[0].startswith(_TEMPLATE_FILES)):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)

    path = folder / "tokenizer.json"
    if not path.is_file() or not base_model.follows_its_file(base_folder, before):
        tokenizer.backend_tokenizer.save(str(path))  # whoever takes the file as it is gets the tokens of the training
    elif old["added_tokens"] != new["added_tokens"]:
        write_json(path, files.read_object(path) | {"added_tokens": new["added_tokens"]})

    path = folder / "tokenizer_config.json"
    settings = files.read_object(path) if path.is_file() else {"tokenizer_class": "TokenizersBackend"}
    special, had = tokenizer.special_tokens_map, before.special_tokens_map
    changed = {name: str(token) for name, token in special.items() if str(token) != str(had.get(name))}
    settings |= changed
    if list(map(str, tokenizer.extra_special_tokens)) != list(map(str, before.extra_special_tokens)):
        settings["extra_special_tokens"] = [str(token) for token in tokenizer.extra_special_tokens]
        settings.pop("additional_special_tokens", None)
    if isinstance(decoder := settings.get("added_tokens_decoder"), dict):
        states = {str(key): token.__getstate__() for key, token in tokenizer.added_tokens_decoder.items()}
        known = before.added_tokens_decoder
        settings["added_tokens_decoder"] = decoder | {
            key: state for key, state in states.items() if key not in decoder and int(key) not in known
        }
    if not same_template:
        _set_template(folder, settings, tokenizer.chat_template)
    _write_or_copy(path, base_model.tokenizer_settings(settings), base_folder / path.name)

    path = folder / "special_tokens_map.json"
    if path.is_file() and changed:
        write_json(path, files.read_object(path) | changed)


def _backend(tokenizer):
    return json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}


def _set_template(folder, settings, template):
    """Put the chat template where versions 4 and 5 find it: a file of its own, and the config if there was one in it."""
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        if "chat_template" in settings:
            settings["chat_template"] = template
    elif template:
        settings["chat_template"] = [{"name": name, "template": text} for name, text in template.items()]
    else:
        settings.pop("chat_template", None)


def refuse_misread(folder, section, config, tokenizer, task=base_model.GENERATION):
    """Raise ProofFailed unless the files read as `config` and `tokenizer`, and say the same in both spellings.

    task: what the model is opened for, without the labels: they are to be read.
    """
    opened = section.model_copy(update={"name_or_path": str(folder), "revision": None})
    written = base_model.find(opened, False, dataclasses.replace(task, labels=()))
    found, expected = _as_dict(base_model.read_config(written, section)), _as_dict(config)
    # the old spelling, where this version keeps it as it is and computes with rope_parameters
    older = _older_spellings(expected)
    old = {name for name, value in older.items() if name not in expected and found.get(name) == value}
    names = sorted((found.keys() | expected.keys()) - _NOT_OF_THE_MODEL - old)
    problems = [
        f"config.json: {name} reads as {found.get(name)!r}, the merged model has {expected.get(name)!r}"
        for name in names
        if _without_dtype(found.get(name)) != _without_dtype(expected.get(name))
    ]
    raw = files.read_object(folder / "config.json")
    for name, value in older.items() if base_model.whole_config(folder) is None else ():
        if name not in raw:
            problems.append(f"config.json: {name} is missing; one version of transformers reads it, as {value!r}")
    problems += (
        _of_tokenizer(folder, section, tokenizer) if task.file.HAS_TOKENS else _of_processor(folder, section, tokenizer)
    )
    if problems:
        raise ProofFailed(
            "\n  ".join(
                [f"the config and tokenizer files of the export are wrong, {len(problems)} problems:", *problems]
            )
        )


def _of_tokenizer(folder, section, tokenizer):
    """Return in words how the tokenizer in a folder differs from that of the training."""
    problems, read = [], base_model.load_tokenizer(folder, section)
    if read.get_vocab() != tokenizer.get_vocab():
        problems.append("tokenizer.json: other tokens than in training")
    if read.chat_template != tokenizer.chat_template:
        problems.append("the chat template differs from the one of the training")
    if [row.input_ids for row in text_rows(read)] != [row.input_ids for row in text_rows(tokenizer)]:
        problems.append("tokenizer.json: encodes text differently from the tokenizer of the training")
    return problems


def _of_processor(folder, section, processor):
    """Return in words how the image processor in a folder differs from that of the training."""
    read, identity = base_model.load_image_processor(folder, section), base_model.image_processor.identity
    same = identity(read) == identity(processor)
    return [] if same else [f"{base_model.image_processor.FILE}: another image processor than in training"]


def _without_dtype(value):
    return (
        {name: _without_dtype(one) for name, one in value.items() if name not in _NOT_OF_THE_MODEL}
        if isinstance(value, dict)
        else value
    )
