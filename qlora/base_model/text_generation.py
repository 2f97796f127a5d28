"""The task text-generation: a causal language model, which answers token by token.

What a task is to all other parts are the names in this file. Another task is another file with the same names:

NAME                what transformers calls a pipeline for it
PEFT_TYPE           what PEFT calls it
CLASS               how the names of transformers' models for it end; tasks.py goes by that
HAS_CLASSES         whether an answer is a class: see classification.py
HAS_TOKENS          whether rows are token ids, made by a tokenizer; else an image processor makes pixels (image_processor.py)
auto_name, auto_class  transformers' class that opens a folder for it
settle_config       what the task writes into a config that was read; refused where there is no such model
head_names          modules that make the answer
kept_names          modules that are never quantized, and never a target of "all linear layers": these, and maybe more
is_of_head          whether a parameter is of a head that training begins with random numbers, where the files have none
is_of_another_head  whether a tensor of the files may be left there, because it is of a head for something else
begin_head          those random numbers
written_to_config   what of the task belongs into the config.json of an export
accept_arguments    calls of `forward` that differ between architectures, made the same
refuse_unsuitable   a model that would learn something else than the task

Labels of a row of T tokens are T token ids, IGNORE_INDEX where nothing is trained (data/masked_examples.py);
logits are (B, T, V), and those at a position are of the next token. An answer ends at a stop token (data/chat.py).
"""

from __future__ import annotations

import functools
import inspect
import types

import torch

from ..system.errors import InputError

NAME, PEFT_TYPE, CLASS = "text-generation", "CAUSAL_LM", "ForCausalLM"
HAS_CLASSES, HAS_TOKENS = False, True

# of a forward pass, with the values that mean nothing where a model does not know them
_WITHOUT_EFFECT = {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}


def auto_name(multimodal=False):
    """Return the name of transformers' class that opens a folder for this task, of a multimodal one the whole of it."""
    return "AutoModelForImageTextToText" if multimodal else "AutoModelForCausalLM"


def auto_class(multimodal=False):
    """Return the class of that name."""
    import transformers

    return getattr(transformers, auto_name(multimodal))


def settle_config(config, task, checkpoint, pad_token_id=None):
    """Raise InputError if neither transformers nor code that comes with the model has a model for this task with this config."""
    if type(config) not in auto_class()._model_mapping and auto_name() not in getattr(config, "auto_map", {}):
        raise InputError(f"{checkpoint.folder / 'config.json'}: {config.model_type!r} is not a causal language model")


def head_names(model):
    """Return the name of the module that makes the logits, in a list."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


kept_names = head_names


def is_of_head(model, name):
    """False: a head for words has been trained with the model."""
    return False


is_of_another_head = is_of_head


def begin_head(model, missing, seed):
    """Nothing is missing."""


def written_to_config(config):
    """Return {}: the base's own config.json says all."""
    return {}


def accept_arguments(model):
    """Let `model` be called as transformers' own models are, where its forward takes fewer arguments; return it.

    PEFT passes output_attentions and others to every model, and qlora logits_to_keep. A model with its own code that does
    not know them computes all logits, of which the wanted ones are returned; an argument that would matter is refused.
    """
    original = type(model).forward
    known = inspect.signature(original).parameters
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    if "logits_to_keep" in known and (takes_all or known.keys() >= _WITHOUT_EFFECT | {"inputs_embeds", "labels"}):
        return model

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        keep = 0 if "logits_to_keep" in known else kwargs.pop("logits_to_keep", 0)
        unknown = {} if takes_all else {name: value for name, value in kwargs.items() if name not in known}
        needed = [name for name, value in unknown.items() if value is not None and name not in _WITHOUT_EFFECT]
        if needed:
            raise InputError(
                f"the forward of {type(self).__name__} takes no {', '.join(needed)}; use another model class"
            )
        found = original(self, *args, **{name: value for name, value in kwargs.items() if name not in unknown})
        if not hasattr(found, "logits"):
            raise InputError(f"the forward of {type(self).__name__} returns no object with `logits`")
        if not (isinstance(keep, int) and keep == 0):
            found.logits = found.logits[:, slice(-keep, None) if isinstance(keep, int) else keep]
        return found

    model.forward = types.MethodType(forward, model)  # not a closure over the model: copies of it call themselves
    return model


def refuse_unsuitable(model, checkpoint):
    """Raise InputError if a position's logits depend on tokens after it: in training it would be shown its answers.

    Says so of what is computed, whatever the architecture is called (BertLMHeadModel is none without `is_decoder`): the
    gradient of the first half's logits by the second half's embeddings is exactly zero where a mask is causal.
    """
    embedding, found = model.get_input_embeddings(), []

    def watch(module, arguments, output):
        found.append(output.detach().requires_grad_())
        return found[-1]

    num_tokens, half = 12, 6
    ids = (torch.arange(num_tokens, device=model.device) * 37 + 11) % embedding.weight.shape[0]
    handle = embedding.register_forward_hook(watch)
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids[None]).logits[0, :half].float()
            # weighted, so that nothing cancels: the sum of a softmax or of a normalized row does not change at all
            weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).reshape(logits.shape)
            # float16 overflows at 1 (SmolLM2-135M), and what is masked is nan then
            for scale in (1.0, 2.0**-8, 2.0**-16):
                total = (logits * weights).sum() * scale
                [gradient] = torch.autograd.grad(total, found[:1], retain_graph=True)
                if torch.isfinite(gradient).all():
                    break
    finally:
        handle.remove()
    if gradient[0, half:].count_nonzero():
        declared = getattr(model.config, "is_decoder", None)
        raise InputError(
            f"{checkpoint.folder}: {type(model).__name__} is not causal: its logits depend on later tokens, so training "
            "would show it the answers"
            + (" (config.json has is_decoder: false)" if declared is False else "")
            + "; take a decoder model such as Llama or Qwen"
        )
