"""Prompt tuning: N embeddings before each text are trained; the model stays as it is.

Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021 (arXiv:2104.08691).
"""

from __future__ import annotations

import contextlib
import types

import torch
from safetensors.torch import load_file

from ..system.errors import InputError
from . import peft_model, targets
from .adapter import Adapter, refuse_unknown_settings
from .contract import Description, Trainable, one_group
from .folder import CONFIG, WEIGHTS

# B rows, T tokens, N trained embeddings, H hidden size

save = peft_model.save

_KEY = "prompt_embeddings"
_SHAPE = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
_SILENT = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")


def attach(model, section, seed=0, token_ids=(), checkpoint=None, examples=()):
    """See contract.Method. checkpoint: whose tokenizer reads prompt_tuning_init_text; examples: nothing is read from them."""
    targets.refuse_token_rows(token_ids, "prompt tuning")
    torch.manual_seed(seed)
    on_meta = model.get_input_embeddings().weight.is_meta
    text = None if on_meta or checkpoint is None else section.prompt_tuning_init_text
    how = {"prompt_tuning_init": "RANDOM" if on_meta else "SAMPLE_VOCAB" if text is None else "TEXT",
           "prompt_tuning_init_text": text,
           "tokenizer_name_or_path": None if text is None else str(checkpoint.folder)}  # fmt: skip
    attached = _made(model, section.num_virtual_tokens, **how)
    config = attached.peft_config["default"]
    # done; and the folder need not name a path of this machine
    config.prompt_tuning_init, config.prompt_tuning_init_text, config.tokenizer_name_or_path = "RANDOM", None, None
    return attached


def _made(model, num_tokens, **how):
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=num_tokens, **how)
    attached = peft_model.make(model, config)
    device = model.get_input_embeddings().weight.device
    attached.prompt_encoder.to(device)
    peft_model.to_dtype(attached, peft_model.dtype_of(model))
    attached.forward = types.MethodType(_forward, attached)
    attached.generate = types.MethodType(_generate, attached)
    attached.activate = types.MethodType(_activate, attached)
    return attached


def _forward(model, input_ids=None, attention_mask=None, labels=None, logits_to_keep=0, position_ids=None, **kwargs):
    """The base's forward with the trained embeddings before each row; logits are those of the row's own tokens.

    PEFT's has logits of the trained embeddings too, so that columns would not be those of the labels.
    """
    base = model.get_base_model()
    embedded = base.get_input_embeddings()(input_ids)
    prompt_BNH = model.get_prompt(batch_size=len(embedded)).to(embedded.dtype)
    number = prompt_BNH.shape[1]
    if attention_mask is not None:
        attention_mask = torch.cat([attention_mask.new_ones(len(embedded), number), attention_mask], dim=1)
    keep = logits_to_keep
    if labels is not None:
        labels = torch.cat([labels.new_full((len(embedded), number), -100), labels], dim=1)
    found = base(
        inputs_embeds=torch.cat([prompt_BNH, embedded], dim=1),
        attention_mask=attention_mask,
        labels=labels,
        logits_to_keep=keep + number if isinstance(keep, torch.Tensor) else keep,
        **kwargs,
    )
    if isinstance(keep, int) and (keep == 0 or keep > embedded.shape[1]):
        found.logits = found.logits[:, -embedded.shape[1] :]
    return found


def _generate(model, input_ids, attention_mask, **kwargs):
    """The base's generate with the trained embeddings before the first token of each row, wherever its padding on the left ends.

    PEFT 0.21 puts them before the padding, so that rows of unlike length answer something else together than alone.
    """
    base = model.get_base_model()
    embedded = base.get_input_embeddings()(input_ids)
    prompt_NH = model.get_prompt(batch_size=1)[0].to(embedded.dtype)
    pads = (attention_mask == 0).sum(1).tolist()
    rows = [torch.cat([row[:pad], prompt_NH, row[pad:]]) for row, pad in zip(embedded, pads, strict=True)]
    mask = torch.cat([attention_mask, attention_mask.new_ones(len(rows), len(prompt_NH))], dim=1)
    answers = base.generate(inputs_embeds=torch.stack(rows), attention_mask=mask, **kwargs)
    return torch.cat([input_ids, answers], dim=1)


def _activate(model, name):
    """Let the prompt called `name` stand before each text from now on; None: none."""
    base = model.get_base_model()
    if name is None:
        model.forward, model.generate = base.forward, base.generate
    else:
        model.forward = types.MethodType(_forward, model)
        model.generate = types.MethodType(_generate, model)
        model.set_adapter(name)
    model.requires_grad_(False)


def trainable(model, section):
    prompt = peft_model.named(model, "prompt_encoder.")
    return Trainable(
        f"prompt tuning, {section.num_virtual_tokens} embeddings", first_to_move=prompt, groups=one_group(model)
    )


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def read(folder, config):
    refuse_unknown_settings(folder, config, {*_SHAPE, *_SILENT})
    tensors = load_file(folder / WEIGHTS)
    shape = tuple(config.get(name) for name in ("num_virtual_tokens", "token_dim"))
    if tensors.keys() != {_KEY} or tuple(tensors[_KEY].shape) != shape:
        raise InputError(f"adapter {folder}: {WEIGHTS} does not hold the {shape} embeddings that {CONFIG} speaks of")
    if not torch.isfinite(tensors[_KEY]).all():
        raise InputError(f"adapter {folder}: {_KEY}: contains non-finite values")
    why = (
        "puts embeddings before the text, which no weight of the base can take up. Serve it beside the base: "
        "`qlora chat RUN`, or any server that loads PEFT's prompt tuning"
    )
    return Adapter(folder, config, describe(config).kind, {}, own=tensors, unmergeable=why, beside=True)


def load(model, adapter, token_ids=()):
    _refuse_another(model, adapter)
    attached = _made(model, adapter.config["num_virtual_tokens"], prompt_tuning_init="RANDOM")
    fill(attached, adapter)
    attached.requires_grad_(False)
    attached.disable_adapter = types.MethodType(_disabled, attached)
    return attached.eval()


@contextlib.contextmanager
def _disabled(model):
    name = model.active_adapter
    _activate(model, None)
    try:
        yield
    finally:
        _activate(model, name)


def fill(model, adapter, ends=()):
    _refuse_another(model, adapter)
    _give(model, adapter, "default")


def add(model, adapter, name):
    from peft import PromptTuningConfig

    peft_model.refuse_another_kind(model, adapter)
    _refuse_another(model, adapter)
    number = adapter.config["num_virtual_tokens"]
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=number, prompt_tuning_init="RANDOM")
    model.add_adapter(name, config)
    _give(model, adapter, name)
    model.prompt_encoder.to(model.get_input_embeddings().weight.device, peft_model.dtype_of(model.get_base_model()))
    model.requires_grad_(False).eval()


def _refuse_another(model, adapter):
    size = model.get_input_embeddings().weight.shape[1]
    if adapter.config["token_dim"] != size:
        raise InputError(
            f"adapter {adapter.folder}: made for another base; its embeddings have {adapter.config['token_dim']} numbers, "
            f"the base's {size}"
        )


@torch.no_grad()
def _give(model, adapter, name):
    weight = model.prompt_encoder[name].embedding.weight
    if weight.shape != adapter.own[_KEY].shape:
        raise InputError(f"adapter {adapter.folder}: has {len(adapter.own[_KEY])} embeddings, the recipe {len(weight)}")
    weight.copy_(adapter.own[_KEY])


def describe(config):
    return Description(
        "prompt tuning", f"{config.get('num_virtual_tokens')} embeddings", "{W}, and embeddings before the text"
    )
