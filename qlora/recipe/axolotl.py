"""A YAML file of axolotl -> a draft of a recipe.

Names and defaults: its config reference, docs.axolotl.ai/docs/config-reference.html.
"""

from __future__ import annotations

from ..system.errors import InputError
from .foreign import OF_TRAINER, Draft, flag, names, number, optimizer, scheduler, share, text, warmup, whole

KEY = "base_model"
_LOCAL = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")
_READERS = {"json", "csv", "parquet", "text", "arrow"}
# names of prompt styles whose rows are known here by their keys
_KNOWN = {None, "alpaca", "sharegpt", "chat_template", "completion"}

_MODEL = {
    KEY: ("model.name_or_path", text),
    "revision_of_model": ("model.revision", text),
    "trust_remote_code": ("model.trust_remote_code", flag),
    "lora_model_dir": ("model.adapter_name_or_path", text),
}
_LORA = {
    "lora_r": ("lora.r", whole),
    "lora_alpha": ("lora.lora_alpha", number),
    "lora_dropout": ("lora.lora_dropout", number),
    "lora_target_modules": ("lora.target_modules", names),
    "lora_modules_to_save": ("lora.modules_to_save", names),
    "peft_layers_to_transform": ("lora.layers_to_transform", lambda value: [whole(one) for one in value]),
    "peft_use_dora": ("lora.use_dora", flag),
    "peft_use_rslora": ("lora.use_rslora", flag),
    "peft_init_lora_weights": ("lora.init_lora_weights", lambda value: value),
    "loraplus_lr_ratio": ("lora.loraplus_lr_ratio", number),
}
_REST = {
    "val_set_size": ("data.eval_fraction", share),
    "sequence_len": ("data.max_length", whole),
    "sample_packing": ("data.packing", flag),
    "excess_length_strategy": ("data.overlong", lambda value: {"drop": "drop", "truncate": "truncate"}[value]),
    "dataset_processes": ("data.num_proc", whole),
    "num_epochs": ("training.num_train_epochs", number),
    "micro_batch_size": ("training.per_device_train_batch_size", whole),
    "eval_batch_size": ("training.per_device_eval_batch_size", whole),
    "optimizer": ("training.optim", optimizer),
    "lr_scheduler": ("training.lr_scheduler_type", scheduler),
    **OF_TRAINER,
}
_ATTENTION = "attention is chosen by itself (model.attn_implementation)"
_KERNELS = "kernels are chosen by themselves (kernels: auto)"
_DTYPE = "the card decides (quantization.compute_dtype)"
_CONFIG = "the model's own config says it"
_NOT_NEEDED = {
    **dict.fromkeys("flash_attention sdp_attention xformers_attention eager_attention attn_implementation".split(), _ATTENTION),
    **dict.fromkeys("lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel".split(), _KERNELS),
    **dict.fromkeys("bf16 fp16 tf32 bfloat16 float16".split(), _DTYPE),
    **dict.fromkeys("model_type tokenizer_type is_llama_derived_model is_mistral_derived_model".split(), _CONFIG),
    **dict.fromkeys("is_qwen_derived_model is_falcon_derived_model".split(), _CONFIG),
    "strict": "unknown fields are always refused",
    "dataset_prepared_path": "tokenized rows are kept by themselves",
    "pad_to_sequence_len": "rows are joined without padding",
    "eval_sample_packing": "held-out rows are joined without padding",
    "lora_fan_in_fan_out": "found by itself",
    "use_tensorboard": "TensorBoard files are always written",
    "save_safetensors": "always",
    "debug": "qlora data shows the rows",
}  # fmt: skip
_WHY = {
    "warmup_steps": "a share of the steps here, training.warmup_ratio",
    "evals_per_epoch": "set training.eval_steps",
    "saves_per_epoch": "set training.save_steps",
    "deepspeed": "one GPU here",
    "fsdp": "one GPU here",
    "fsdp_config": "one GPU here",
    "chat_template": "data.chat_template takes a Jinja file, or chatml; the model's own is used",
    "special_tokens": "the tokenizer's own are used; new ones are model.new_tokens",
    "plugins": "not loaded",
}


def read(values) -> Draft:
    """Return the Draft of the file's `values`; raises InputError where it trains something else than answers."""
    draft = Draft("axolotl", values)
    for name in ("rl", "reward_model", "process_reward_model"):
        if draft.values.get(name):
            raise InputError(
                f"{name}: {draft.values[name]}: only supervised training is carried over; write that recipe by hand"
            )
    draft.carry(_MODEL)
    _base_and_method(draft)
    _data(draft)
    warmup(draft, "warmup_steps", "max_steps")
    draft.carry(_REST)
    if any(line.field == "data.packing" and line.value for line in draft.lines) and "group_by_length" in draft.values:
        draft.leave({"group_by_length": "packed rows are full"})
    draft.carry({"group_by_length": ("training.group_by_length", flag)})
    _checkpointing(draft)
    draft.leave(_NOT_NEEDED)
    draft.assume({
        "data.max_length": 512, "data.overlong": "drop", "training.gradient_accumulation_steps": 1,
        "training.optim": "adamw_torch_fused", "output_dir": "./model-out",
    })  # fmt: skip
    for name in [name for name in _WHY if name in draft.values]:
        draft.lacks(name, draft.take(name), _WHY[name])
    return draft.finish()


def _base_and_method(draft):
    adapter, four, eight = (draft.take(name) for name in ("adapter", "load_in_4bit", "load_in_8bit"))
    bits = draft.take("bnb_config_kwargs") or {}
    if adapter not in (None, "lora", "qlora"):
        raise InputError(
            f"adapter: {adapter}: lora, qlora and none are carried over; see docs/methods.md for what there is"
        )
    if eight is not None and flag(eight):
        draft.lacks_8_bit("load_in_8bit", eight)
    elif eight is not None:
        draft.not_needed["load_in_8bit"] = "there is none here"
    in_four = adapter == "qlora" or (four is not None and flag(four))
    theirs = "load_in_4bit" if four is not None else "adapter"
    if in_four and adapter is not None:
        draft.put("quantization.quant_type", bits.pop("bnb_4bit_quant_type", "nf4"), theirs)
        if "bnb_4bit_use_double_quant" in bits:
            draft.put("quantization.use_double_quant", flag(bits.pop("bnb_4bit_use_double_quant")), "bnb_config_kwargs")
    else:
        draft.put("quantization", None, theirs)
    for name, value in bits.items():
        draft.lacks(f"bnb_config_kwargs.{name}", value)
    if adapter is None:
        draft.put("full", {}, "adapter")
        return
    draft.carried["adapter"] = "lora"
    linear = draft.take("lora_target_linear")
    if linear is not None and flag(linear):
        draft.put("lora.target_modules", "all-linear", "lora_target_linear")
    draft.carry(_LORA)


def _data(draft):
    for theirs, ours in (("datasets", "data.train"), ("test_datasets", "data.eval")):
        found = draft.take(theirs)
        if found is not None:
            items = found if isinstance(found, list) else [found]
            draft.put(ours, [_source(draft, f"{theirs}[{index}]", item) for index, item in enumerate(items)], theirs)
    on_inputs = draft.take("train_on_inputs")
    if on_inputs is not None and flag(on_inputs):
        draft.put("data.train_on", "all", "train_on_inputs")
    elif on_inputs is not None:
        draft.not_needed["train_on_inputs"] = "only answers are trained on"


def _source(draft, where, item):
    """Return a source of ours; what it does not take of theirs is named."""
    item = dict(item) if isinstance(item, dict) else {"path": item}
    item = {name: value for name, value in item.items() if value is not None}
    path, files, kind = item.pop("path", None), item.pop("data_files", None), item.pop("ds_type", None)
    files = [files] if isinstance(files, str) else files
    if files and (path in _READERS or kind is not None):
        source = {"path": str(files[0])}
        for other in files[1:]:
            draft.lacks(f"{where}.data_files", other, "one file a source; add it to data.train")
    elif kind is not None or str(path).lower().endswith(_LOCAL) or str(path).startswith((".", "/")):
        source = {"path": str(path)}
    else:
        source = {"name": str(path)}
        for theirs, ours in (("name", "subset"), ("split", "split"), ("revision", "revision")):
            if theirs in item:
                source[ours] = str(item.pop(theirs))
    item.pop("split", None)  # of a local file there is one
    style = item.pop("type", None)
    columns = _columns(item, style)
    if columns:
        source["columns"] = columns
    if isinstance(style, str) and style.split(".")[0] not in _KNOWN:
        draft.lacks(f"{where}.type", style, "rows are known by their keys, or by data.columns: see qlora data")
    elif isinstance(style, dict):
        for name, value in style.items():
            draft.lacks(f"{where}.type.{name}", value)
    for name, value in item.items():
        draft.lacks(f"{where}.{name}", value)
    return source


def _columns(item, style):
    """Return data.columns of the fields that name columns, which are taken out of `item` and `style`."""
    found = {}
    if isinstance(style, dict):
        for name in ("instruction", "input", "output", "system"):
            if f"field_{name}" in style:
                found[name] = str(style.pop(f"field_{name}"))
        if "instruction" in found:
            found.setdefault("output", "output")
    if "field" in item and style == "completion":
        found["text"] = str(item.pop("field"))
    if "field_messages" in item:
        found["messages"] = str(item.pop("field_messages"))
        if found["messages"] in ("messages", "conversations"):
            del found["messages"]
    return found


def _checkpointing(draft):
    value = draft.take("gradient_checkpointing")
    if value is None:
        return
    if str(value).startswith("offload"):
        draft.put("memory.gradient_checkpointing", True, "gradient_checkpointing")
        draft.put("memory.offload", True, "gradient_checkpointing")
    else:
        draft.put("memory.gradient_checkpointing", flag(value), "gradient_checkpointing")
    draft.leave({"gradient_checkpointing_kwargs": "chosen by itself"})
