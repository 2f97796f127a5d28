"""The text half of a multimodal checkpoint as a causal language model of its own; the other half stays in the files.

transformers knows how the files name the tensors of the whole model. The whole is built without numbers, each name in the
files goes through that mapping, and what arrives under the decoder or at the head is the text half. Everything else (vision
tower, projector) is never read into the model that is trained, and an export copies it bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open

from ..system import files
from ..system.errors import InputError
from . import text_generation
from .layers import tied

# Whose text half computes what the whole model computes of text: tests/base_model/test_multimodal.py compares the logits.
FAMILIES = ("gemma3", "gemma4", "internvl", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl",
            "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")  # fmt: skip
# Of these transformers has the text model and no class with a head on it.
_WITHOUT_HEAD = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text")


@dataclass(frozen=True)
class Half:
    """names: {tensor of the text half, as a text-only checkpoint would call it: its name in the files}. whole: {parameter or
    buffer of the whole model: name in the files}. kept: names in the files of all that is not text. parts: what these
    are of. model: the whole one, without numbers.
    """

    names: dict = field(repr=False)
    whole: dict = field(repr=False)
    kept: list = field(repr=False)
    parts: list
    model: object = field(repr=False)

    @contextlib.contextmanager
    def tensors(self, checkpoint):
        """Yield {tensor of the text half: its slice of a mapped file}, which transformers reads as those of a file."""
        with contextlib.ExitStack() as stack:
            opened = {
                name: stack.enter_context(safe_open(checkpoint.folder / name, "pt"))
                for name in sorted(set(checkpoint.files.values()))
            }
            yield {name: opened[checkpoint.files[stored]].get_slice(stored) for name, stored in self.names.items()}

    def name_in_files(self, name):
        """Return what the files of the whole model call parameter `name` of the text half, there or not."""
        if name in self.names:
            return self.names[name]
        outer, inner = next(pair for pair in _prefixes(self.model).items() if name.startswith(pair[1]))
        return outer + name.removeprefix(inner)

    def __str__(self):
        return f"{len(self.kept)} other tensors ({', '.join(self.parts)}) are kept as they are"


def other_parts(config):
    """Return the names of the sub-configs of what is not text; none means that the model is text only."""
    return sorted(
        name
        for name in getattr(type(config), "sub_configs", {})
        if name != "text_config"
        and re.search("vision|image|video|audio|speech", name)
        and getattr(config, name, None) is not None
    )


def whole_config(folder):
    """Return the config of the multimodal model in a folder that `text_config` has let through, None of any other."""
    from transformers import AutoConfig

    if files.read_object(folder / "config.json").get("model_type") not in FAMILIES:
        return None
    config = AutoConfig.from_pretrained(folder)
    return config if other_parts(config) else None


def text_config(config, where, task=text_generation.NAME):
    """Return the config of the text half of a multimodal model, None of a text-only one. task: what it is opened for.

    Raises:
        InputError: the half cannot be trained by itself.
    """
    from transformers import AutoModel

    others = other_parts(config)
    if not others:
        return None
    what = f"{where}: a multimodal checkpoint ({config.model_type}, with {', '.join(others)})"
    if task != text_generation.NAME:
        raise InputError(f"{what}, which cannot be trained for {task}; take a text-only model of this family")
    if (
        config.model_type not in FAMILIES
        or type(config) not in text_generation.auto_class(multimodal=True)._model_mapping
    ):
        raise InputError(
            f"{what}, whose text half cannot be trained by itself; this works for {', '.join(FAMILIES)}, or take a text-only "
            "model of this family"
        )
    if getattr(config, "quantization_config", None):
        raise InputError(f"{what} that is quantized already; give the 16-bit model it was made from")
    text = copy.deepcopy(config.get_text_config())
    text.tie_word_embeddings = getattr(config, "tie_word_embeddings", False)  # what the whole model goes by
    text.name_or_path = config.name_or_path
    if type(text) not in text_generation.auto_class()._model_mapping:
        if text.model_type not in _WITHOUT_HEAD:
            raise InputError(f"{what}, whose text half ({text.model_type}) is not a causal language model")
        with_head = _with_head(AutoModel._model_mapping[type(text)])
        # exist_ok: else transformers passes over, in silence, what is registered for a config of its own
        text_generation.auto_class().register(type(text), with_head, exist_ok=True)
    return text


def half_of(checkpoint):
    """Return the Half of a checkpoint, None of a text-only one.

    Raises:
        InputError: the files hold a tensor that the whole model does not know, or not all of what is not text.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    config = whole_config(checkpoint.folder)
    if config is None:
        return None
    with torch.device("meta"):
        model = text_generation.auto_class(multimodal=True).from_config(config, dtype=torch.float32)
    mapping = get_model_conversion_mapping(model)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if not isinstance(one, WeightRenaming)]
    state, text, names, whole, kept, unknown = model.state_dict(), _prefixes(model), {}, {}, {}, []
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for stored in sorted(checkpoint.files):
        renamed, _ = rename_source_key(stored, renamings, [], model.base_model_prefix, state)
        prefix = next((prefix for prefix in text if renamed.startswith(prefix)), None)
        if prefix is not None:
            names[text[prefix] + renamed.removeprefix(prefix)] = stored
        else:
            final, _ = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            kept[stored] = final
            if final not in state and not any(re.search(pattern, final) for pattern in ignored):
                unknown.append(f"not used by this architecture: {stored}")
        whole[renamed] = stored
    missing = sorted(
        name for name in state.keys() - set(kept.values()) - tied(model).keys() if not name.startswith(tuple(text))
    )
    problems = unknown + [f"missing: {name} (of the part that is no text)" for name in missing if not converters]
    if problems:
        raise InputError.listing(
            f"{checkpoint.folder}: config.json and the weights do not match; the multimodal model", problems
        )
    parts = sorted({name.removeprefix("model.").partition(".")[0] for name in kept.values()})
    return Half(names, whole, list(kept), parts, model)


def _prefixes(model):
    """Return {prefix of parameters of the whole model: what stands there in the text half}."""
    decoder = model.get_decoder()
    name = next(name for name, module in model.named_modules() if module is decoder)
    return {f"{name}.": "model.", "lm_head.": "lm_head."}


def _with_head(text_model):
    """Return a causal language model class: transformers' `text_model` under a linear head."""
    from transformers import GenerationMixin
    from transformers.modeling_outputs import CausalLMOutputWithPast

    family: Any = text_model.__bases__[0]  # what attention it supports, how weights are initialised

    class TextHalf(family, GenerationMixin):
        config_class = text_model.config_class
        base_model_prefix = "model"
        input_modalities = ("text",)
        _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' own form)

        def __init__(self, config):
            super().__init__(config)
            self.model = text_model(config)
            self.vocab_size = config.vocab_size
            self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            inputs_embeds=None,
            labels=None,
            use_cache=None,
            logits_to_keep=0,
            **kwargs,
        ):
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
            columns = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(found.last_hidden_state[:, columns])
            loss = None
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
            return CausalLMOutputWithPast(
                loss=loss,
                logits=logits,
                past_key_values=found.past_key_values,
                hidden_states=found.hidden_states,
                attentions=found.attentions,
            )

    TextHalf.__name__ = TextHalf.__qualname__ = f"{text_model.__name__.removesuffix('Model')}ForCausalLM"
    return TextHalf
