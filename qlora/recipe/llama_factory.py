"""A YAML file of LLaMA-Factory -> a draft of a recipe.

Names and defaults: its documented arguments, and transformers' TrainingArguments.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..system import files
from ..system.errors import InputError
from .foreign import OF_TRAINER, Draft, flag, names, number, optimizer, scheduler, share, text, warmup, whole

KEYS = ("stage", "finetuning_type", "dataset", "template", "cutoff_len", "lora_rank", "lora_target", "do_train")

_LORA = {
    "lora_rank": ("lora.r", whole),
    "lora_alpha": ("lora.lora_alpha", number),
    "lora_dropout": ("lora.lora_dropout", number),
    "lora_target": ("lora.target_modules", names),
    "additional_target": ("lora.modules_to_save", names),
    "loraplus_lr_ratio": ("lora.loraplus_lr_ratio", number),
    "use_rslora": ("lora.use_rslora", flag),
    "use_dora": ("lora.use_dora", flag),
}
_REST = {
    "model_name_or_path": ("model.name_or_path", text),
    "model_revision": ("model.revision", text),
    "adapter_name_or_path": ("model.adapter_name_or_path", text),
    "trust_remote_code": ("model.trust_remote_code", flag),
    "val_size": ("data.eval_fraction", share),
    "cutoff_len": ("data.max_length", whole),
    "preprocessing_num_workers": ("data.num_proc", whole),
    "per_device_train_batch_size": ("training.per_device_train_batch_size", whole),
    "per_device_eval_batch_size": ("training.per_device_eval_batch_size", whole),
    "num_train_epochs": ("training.num_train_epochs", number),
    "optim": ("training.optim", optimizer),
    "lr_scheduler_type": ("training.lr_scheduler_type", scheduler),
    "group_by_length": ("training.group_by_length", flag),
    **OF_TRAINER,
}
_NOT_NEEDED = {
    **dict.fromkeys(("bf16", "fp16", "pure_bf16", "tf32"), "the card decides (quantization.compute_dtype)"),
    **dict.fromkeys(("flash_attn", "use_unsloth", "enable_liger_kernel"), "attention and kernels are chosen by themselves"),
    **dict.fromkeys(("do_eval", "eval_strategy", "evaluation_strategy"), "training.eval_steps says it"),
    "do_train": "qlora train does",
    "save_strategy": "training.save_steps says when",
    "overwrite_cache": "tokenized rows are kept by what they are made of",
    "plot_loss": "qlora report draws it",
    "report_to": "TensorBoard files are written; other trackers: training.report_to",
    "save_only_model": "checkpoints can always be resumed",
    "template": "the model's own chat template is used; another is data.chat_template",
    "ddp_timeout": "one process here",
}  # fmt: skip
_WHY = {"overwrite_output_dir": "a run is never overwritten", "deepspeed": "one GPU here"}


def read(values, folder) -> Draft:
    """Return the Draft of the file's `values`. folder: where the file lies, in which dataset_info.json is looked for.

    Raises:
        InputError: it trains something else than answers.
    """
    draft = Draft("LLaMA-Factory", values)
    stage = draft.take("stage", "sft")
    if stage not in ("sft", "pt"):
        raise InputError(
            f"stage: {stage}: only supervised training (sft, pt) is carried over; write that recipe by hand"
        )
    if stage == "sft":
        draft.not_needed["stage"] = "supervised training is what there is without a section for another"
    else:
        draft.put("data.train_on", "all", "stage")
    _base_and_method(draft)
    _data(draft, Path(folder))
    warmup(draft, "warmup_steps", "max_steps")
    steps = draft.values.get("max_steps")
    if steps is not None and not number(steps) > 0:  # -1: by epochs
        draft.leave({"max_steps": "epochs decide"})
    draft.carry(_REST)
    if flag(draft.take("train_on_prompt", False)):
        draft.put("data.train_on", "all", "train_on_prompt")
    if flag(draft.take("mask_history", False)):
        draft.put("data.train_on", "last_assistant", "mask_history")
    packing = [name for name in ("packing", "neat_packing") if name in draft.values]
    if [name for name in packing if flag(draft.take(name))]:
        draft.put("data.packing", True, packing[-1])
    _checkpointing(draft)
    draft.leave(_NOT_NEEDED)
    draft.assume({
        "data.overlong": "truncate", "training.num_train_epochs": 3.0, "training.learning_rate": 5e-5,
        "training.per_device_train_batch_size": 8, "training.gradient_accumulation_steps": 1, "training.optim": "adamw_torch",
        "training.lr_scheduler_type": "linear", "training.warmup_ratio": 0.0, "output_dir": "saves/migrated",
    })  # fmt: skip
    for name in [name for name in _WHY if name in draft.values]:
        draft.lacks(name, draft.take(name), _WHY[name])
    return draft.finish()


def _base_and_method(draft):
    method, bits = draft.take("finetuning_type", "lora"), draft.take("quantization_bit")
    if method not in ("lora", "full"):
        raise InputError(
            f"finetuning_type: {method}: lora and full are carried over; see docs/methods.md for what there is"
        )
    by = draft.take("quantization_method", "bnb")
    if by not in ("bnb", "bitsandbytes"):
        draft.lacks("quantization_method", by, "bitsandbytes quantizes here")
    if bits is not None and whole(bits) == 4:
        draft.put("quantization.quant_type", draft.take("quantization_type", "nf4"), "quantization_bit")
        if "double_quantization" in draft.values:
            draft.carry({"double_quantization": ("quantization.use_double_quant", flag)})
    else:
        if bits is not None:
            draft.lacks_8_bit("quantization_bit", bits)
        draft.put("quantization", None, "quantization_bit unset" if bits is None else "quantization_bit")
    if method == "full":
        draft.put("full", {}, "finetuning_type")
        return
    draft.carried["finetuning_type"] = "lora"
    rank = whole(draft.values.get("lora_rank", 8))
    if flag(draft.take("pissa_init", False)):
        draft.put("lora.init_lora_weights", "pissa", "pissa_init")
    draft.carry(_LORA)
    draft.assume({"lora.r": 8, "lora.lora_alpha": 2 * rank})


def _data(draft, folder):
    where = text(draft.take("dataset_dir", "data"))
    cap = draft.take("max_samples")
    known = _known(folder, where)
    for theirs, ours in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        found = draft.take(theirs)
        if found is None:
            continue
        listed = names(found)
        sources = [_source(draft, theirs, name, where, known.get(name)) for name in listed]
        if cap is not None:
            sources = [source | {"max_rows": whole(cap)} for source in sources]
            draft.carried["max_samples"] = "max_rows of each source"
        draft.put(ours, sources, theirs)
    draft.carried["dataset_dir"] = "the folder of the files"


def _known(folder, where):
    """Return what dataset_info.json says of data sets, by name; empty where it is not there."""
    for place in (Path(where), folder / where, folder):
        path = place / "dataset_info.json"
        if path.is_file():
            try:
                found = json.loads(files.read(path, "dataset_info.json"))
            except ValueError as error:
                raise InputError(f"{path}: no JSON: {error}") from None
            return {name: one | {"_folder": str(place)} for name, one in found.items() if isinstance(one, dict)}
    return {}


def _source(draft, theirs, name, where, described):
    """Return a source of ours for the data set `name`; what dataset_info.json says and we do not take is named."""
    if described is None:
        path = name if "." in name else f"{where.rstrip('/')}/{name}.json"
        draft.lacks(f"{theirs} {name}", path, "a guess, as dataset_info.json does not name it: set data.train")
        return {"path": path}
    said = dict(described)
    folder = said.pop("_folder")
    if "file_name" in said:
        source = {"path": str(Path(folder) / str(said.pop("file_name")))}
    elif "hf_hub_url" in said:
        source = {"name": str(said.pop("hf_hub_url"))}
        source |= {name: str(said.pop(name)) for name in ("subset", "split") if name in said}
    else:
        raise InputError(f"dataset_info.json: {name} has neither file_name nor hf_hub_url; set data.train by hand")
    if said.get("ranking"):
        raise InputError(
            f"dataset_info.json: {name} has preference pairs (ranking); supervised training does not take them"
        )
    shape = said.pop("formatting", "alpaca")
    columns = _columns(said.pop("columns", {}), shape)
    if columns:
        source["columns"] = columns
    for key, value in said.items():
        draft.lacks(f"{name}.{key}", value)
    return source


def _columns(theirs, shape):
    ours = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
    found = {ours.get(name, name): column for name, column in theirs.items() if column}
    if shape == "alpaca" and found:
        found = {"instruction": "instruction", "output": "output"} | found
    return {} if all(name == column for name, column in found.items()) else found


def _checkpointing(draft):
    if "disable_gradient_checkpointing" in draft.values:
        off = flag(draft.take("disable_gradient_checkpointing"))
        draft.put("memory.gradient_checkpointing", not off, "disable_gradient_checkpointing")
