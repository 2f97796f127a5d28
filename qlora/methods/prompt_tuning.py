"""Prompt tuning: N embeddings before each text are trained; the model stays as it is.

Source: Lester et al., The Power of Scale for Parameter-Efficient Prompt Tuning, 2021 (arXiv:2104.08691).
"""

from __future__ import annotations

import torch

from ..system.errors import InputError
from . import peft_model, targets, virtual_tokens
from .contract import Description, Trainable, one_group

# B rows, T tokens, N trained embeddings, H hidden size

save = peft_model.save

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
    attached = virtual_tokens.attached(model, _config(section.num_virtual_tokens, **how), _forward, _generate)
    config = attached.peft_config["default"]
    # done; and the folder need not name a path of this machine
    config.prompt_tuning_init, config.prompt_tuning_init_text, config.tokenizer_name_or_path = "RANDOM", None, None
    return attached


def _forward(model, input_ids=None, attention_mask=None, logits_to_keep=0, position_ids=None, **kwargs):
    """The base's forward with the trained embeddings before each row; logits are those of the row's own tokens.

    PEFT's has logits of the trained embeddings too, so that columns would not be those of the labels.
    """
    base = model.get_base_model()
    embedded = base.get_input_embeddings()(input_ids)
    prompt_BNH = model.get_prompt(batch_size=len(embedded)).to(embedded.dtype)
    number, length, keep = prompt_BNH.shape[1], embedded.shape[1], logits_to_keep
    if attention_mask is not None:
        attention_mask = virtual_tokens.with_mask(attention_mask, number)
    return base(
        inputs_embeds=torch.cat([prompt_BNH, embedded], dim=1),
        attention_mask=attention_mask,
        logits_to_keep=keep + number if isinstance(keep, torch.Tensor) else min(keep or length, length),
        **kwargs,
    )


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


def trainable(model, section):
    prompt = peft_model.named(model, "prompt_encoder.")
    return Trainable(
        f"prompt tuning, {section.num_virtual_tokens} embeddings", first_to_move=prompt, groups=one_group(model)
    )


# ---- saved and loaded ------------------------------------------------------------------------------------------------


def read(folder, config):
    why = (
        "puts embeddings before the text, which no weight of the base can take up. Serve it beside the base: "
        "`qlora chat RUN`, or any server that loads PEFT's prompt tuning"
    )
    return virtual_tokens.read(folder, config, describe(config).kind, config.get("token_dim"), _SILENT, why)


def load(model, adapter, token_ids=()):
    _refuse_another(model, adapter)
    attached = virtual_tokens.attached(model, _config_of(adapter), _forward, _generate)
    virtual_tokens.fill(attached, adapter)
    return attached.requires_grad_(False).eval()


def fill(model, adapter, ends=()):
    _refuse_another(model, adapter)
    virtual_tokens.fill(model, adapter)


def _config(number, **how):
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=number, **how)


def _config_of(adapter):
    return _config(adapter.config["num_virtual_tokens"], prompt_tuning_init="RANDOM")


def _refuse_another(model, adapter):
    size = model.get_input_embeddings().weight.shape[1]
    if adapter.config["token_dim"] != size:
        raise InputError(
            f"adapter {adapter.folder}: made for another base; its embeddings have {adapter.config['token_dim']} numbers, "
            f"the base's {size}"
        )


def describe(config):
    return Description(
        "prompt tuning", f"{config.get('num_virtual_tokens')} embeddings", "{W}, and embeddings before the text"
    )
