"""Name -> frozen base model in NF4 and its tokenizer. The dtype policy is here and nowhere else:

weight of every linear layer but the head   uint8 NF4 codes; per block of 64 an 8-bit absmax (double quantization)
every other parameter                       quantization.compute_dtype (bfloat16 by default)
buffers                                     as the architecture makes them (rotary frequencies are float32)
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import re
import types
from pathlib import Path

import torch
from safetensors import safe_open

from ..system import memory
from ..system.errors import DoesNotFit, InputError
from . import prequantized
from .folder import (
    Checkpoint,
    add_tokens,
    find,
    load_config,
    load_tokenizer,
    read_config,
    refuse_generation,
    said,
    weight_files,
)
from .limits import num_positions, refuse_rows
from .multimodal import whole_config
from .prequantized import settle, stored_quantization

__all__ = [
    "Checkpoint",
    "add_tokens",
    "find",
    "load_config",
    "load_tokenizer",
    "num_positions",
    "read_config",
    "refuse_generation",
    "refuse_rows",
    "settle",
    "stored_quantization",
    "weight_files",
    "whole_config",
]

# W is cast to bfloat16 before it is quantized, whatever the files hold: fp32, fp16 and bf16 copies of one weight give
# different NF4 codes, so the dtype is part of what was trained.
DTYPE_WHEN_QUANTIZED = torch.bfloat16


def load(checkpoint, section, quantization, device=None, dtype=DTYPE_WHEN_QUANTIZED):
    """Return the frozen model of `checkpoint` in eval mode: NF4 under `quantization`, or plain `dtype` if it is None.

    Where the files hold NF4 codes, the model has these, and of `quantization` only compute_dtype counts. It has a row for
    each of the checkpoint's new tokens; see `add_rows` for where these start.

    Raises:
        DoesNotFit: there is not enough memory.
        InputError: a weight is missing, left over or of another shape than the config says; names them.
    """
    from transformers import BitsAndBytesConfig

    device = torch.device(device or default_device())
    num_rows = load_config(checkpoint, section).get_text_config().vocab_size
    config, bnb = read_config(checkpoint, section), None
    compute_dtype = quantization.compute_dtype if quantization else "bfloat16"
    stored = stored_quantization(config)
    if stored:
        refuse_other_codes(checkpoint, on_meta(config, section.trust_remote_code))
        if device.type == "meta":  # transformers would read the codes
            return load_on_meta(config, section, quantization, dtype, codes=False)
        config.quantization_config = stored | {"bnb_4bit_compute_dtype": compute_dtype}
    elif quantization:
        bnb = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.quant_type,
            bnb_4bit_use_double_quant=quantization.use_double_quant,
            bnb_4bit_compute_dtype=dtype_of(compute_dtype),
        )
    try:
        if device.type != "meta":  # where nothing is read
            _refuse_not_finite(checkpoint, section)
        model, info = _from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            quantization_config=bnb,
            device_map={"": device},
            attn_implementation=None if section.attn_implementation == "auto" else section.attn_implementation,
            trust_remote_code=section.trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported like the rest, below; nothing is let through
            output_loading_info=True,
        )
    except InputError:
        raise
    except Exception as error:  # an architecture computes with what its config says, as in on_meta
        if memory.is_refusal(error):
            raise DoesNotFit(
                f"out of memory while {checkpoint.name_or_path} was loaded: {memory.refused(error)}\n  free some memory, use a "
                f"smaller model{'' if quantization else ', or leave out quantization: null'}"
            ) from None
        raise InputError(f"{checkpoint.folder}: cannot load the model: {said(error)}") from error
    _refuse_incomplete(checkpoint, info)
    accept_arguments(model)
    if stored:
        _settle_dtypes(model, dtype)
    if quantization and compute_dtype == "float32":
        to_float32(model)
    if quantization and not quantized_modules(model):
        raise InputError(f"{checkpoint.folder}: no linear layer could be quantized; set quantization: null")
    _refuse_rows_that_are_no_blocks(checkpoint, quantized_modules(model))
    for module in quantized_modules(model).values():
        # Without this, one forward in eval mode on an AVX512-BF16 host repacks the weight in place: from then on
        # gradients through the base are None and dequantize_4bit returns garbage (bitsandbytes 0.50.2).
        module.support_avx512bf16_for_cpu = False
    if checkpoint.new_tokens:
        add_rows(model, checkpoint.added, num_rows)
    model.requires_grad_(False)
    # what the files were called by the user, so that an adapter names a model and not a cache folder
    model.name_or_path = model.config._name_or_path = checkpoint.name_or_path
    return model.eval()


def _from_pretrained(checkpoint, config, **settings):
    """Return what AutoModelForCausalLM.from_pretrained does; of a multimodal checkpoint, of its text half."""
    from transformers import AutoModelForCausalLM

    half = checkpoint.half
    if half is None:
        return AutoModelForCausalLM.from_pretrained(checkpoint.folder, config=config, **settings)
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    with half.tensors(checkpoint) as tensors:
        model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **settings)
    model.generation_config = checkpoint.generation_config() or model.generation_config
    return model, info


def _settle_dtypes(model, dtype):
    """Let a model whose 4-bit weights were read as codes have the dtypes of one that was quantized when it was loaded.

    transformers 5.23 leaves whatever is called `weight` in the dtype of the file then, and casts biases.
    """
    in_float32 = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if any(one in name for one in in_float32) else dtype)
    for module in quantized_modules(model).values():
        module.weight.quant_state.dtype = dtype  # in which dequantizing ends


# of a forward pass, with the values that mean nothing where a model does not know them
_WITHOUT_EFFECT = {"use_cache", "return_dict", "output_attentions", "output_hidden_states"}


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


@torch.no_grad()
def add_rows(model, added, num_rows):
    """Grow embedding and head to `num_rows`; set these rows and the spare ones of `added` ids to the mean of all before.

    A new token then starts out about as likely as the average one, where a random or an unused row would be anywhere:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html. The mean is taken in float32 and has no random part.
    """
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    means = [layer.weight.mean(0, dtype=torch.float32) for layer in layers]
    num_before = layers[0].weight.shape[0]
    if num_rows > num_before:
        model.resize_token_embeddings(num_rows, mean_resizing=False)
    ids = sorted(added.union(range(num_before, num_rows)))
    for layer, mean in zip([model.get_input_embeddings(), model.get_output_embeddings()], means, strict=True):
        layer.weight[ids] = mean.to(layer.weight.dtype)


def _refuse_not_finite(checkpoint, section):
    """Raise InputError if a weight in the files holds NaN or infinity; names the tensors.

    In the files, not in the model: the codes of a 4-bit weight cannot say so any more. What the architecture leaves in
    the files may be anything: GPT-NeoX's masked_bias of -1e9 is -inf in float16.
    """
    wrong: dict = {}
    kept = set(checkpoint.half.kept) if checkpoint.half else set()
    for name in sorted(set(checkpoint.files.values())):
        with safe_open(checkpoint.folder / name, "pt") as file:
            for key in sorted(set(file.keys()) - kept):
                tensor = file.get_tensor(key)  # mapped: what is read here is in memory when the model is loaded
                if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
                    wrong[key] = f"{key}: contains non-finite values ({name})"
    unused = _left_in_the_files(checkpoint, section, wrong) if wrong else set()
    problems = [problem for key, problem in wrong.items() if key not in unused]
    if problems:
        raise InputError.listing(
            f"{checkpoint.folder}: the weights are broken; the model", problems, "download it again"
        )


def _left_in_the_files(checkpoint, section, keys):
    """Return those of `keys`, names in the files, that the architecture knows and does not read."""
    model = on_meta(read_config(checkpoint, section), section.trust_remote_code)
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    prefix, read = f"{model.base_model_prefix}.", model.state_dict().keys()
    return {
        key
        for key in keys
        if any(re.search(pattern, key) for pattern in patterns)
        and not read & {key, key.removeprefix(prefix), prefix + key}
    }


def _is_finite(tensor):
    tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    # one reduction: 14 GB/s a core, where isfinite().all() has 0.25; both ends are NaN if one number is
    return all(math.isfinite(end.item()) for end in torch.aminmax(tensor))


def _refuse_incomplete(checkpoint, info):
    problems = [f"missing: {key} (it would be filled with random numbers)" for key in sorted(info["missing_keys"])]
    problems += [f"not used by this architecture: {key}" for key in sorted(info["unexpected_keys"])]
    problems += [
        f"wrong shape: {key} is {tuple(found)} in the files, {tuple(expected)} by config.json"
        for key, found, expected in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise InputError.listing(f"{checkpoint.folder}: config.json and the weights do not fit; the model", problems)


def _refuse_rows_that_are_no_blocks(checkpoint, modules):
    """Raise InputError where bitsandbytes would compute with wrong weights.

    It quantizes in blocks of 64 numbers that run on from row to row; on a CPU, 0.50.2 dequantizes as if each row began
    a block. For rows of 96 numbers the result is 63 % off, where 4 bits cost 9 %, and nothing is said.
    """
    wrong = [
        f"{name}: {module.in_features} inputs"
        for name, module in modules.items()
        if module.weight.device.type == "cpu" and module.in_features % module.weight.blocksize
    ]
    if wrong:
        raise InputError.listing(
            f"{checkpoint.folder}: on a CPU, 4-bit layers need inputs in multiples of 64; the model",
            wrong,
            "set quantization: null, or use a GPU",
        )


def refuse_not_causal(model, checkpoint):
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
            [gradient] = torch.autograd.grad((logits * weights).sum(), found[:1])
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


def dtype_of(name):
    """Return the torch dtype that a recipe calls "float16", "bfloat16" or "float32"."""
    return getattr(torch, name)


def default_device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def quantized_modules(model):
    """Return {name: module} of the 4-bit linear layers of a plain or PEFT model."""
    from bitsandbytes.nn import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def digest(codes):
    """Return the sha256 of the codes of a 4-bit weight.

    They depend on nothing but the weight. The constants of double quantization do on the order in which a mean is summed,
    so on the number of threads.
    """
    return hashlib.sha256(codes.cpu().contiguous().numpy()).hexdigest()


def digests(model):
    """Return {name: digest} of the 4-bit linear layers of a plain model."""
    return {name: digest(module.weight.data) for name, module in quantized_modules(model).items()}


def is_conv1d(module):
    """True for GPT-2's linear layers, which store their weight as (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def linear_names(model):
    """Return the names of the linear layers that can carry an adapter: all but the head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, torch.nn.Linear) or is_conv1d(module)) and module is not head
    ]


def names_to_quantize(config, section):
    """Return the names of the layers that are in 4 bit in a quantized model with this config."""
    return _names_in_4_bit(on_meta(config, section.trust_remote_code))


def _names_in_4_bit(model):
    names = linear_names(model)
    return prequantized.chosen(model, names) if stored_quantization(model.config) else names


def refuse_other_codes(checkpoint, model):
    """Raise InputError where the files hold NF4 codes and those are not what `model`, on the meta device, has in 4 bit."""
    if not stored_quantization(model.config):
        return
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if prequantized.chosen(model, [head]):
        raise InputError(
            f"{checkpoint.folder}: the head ({head}) is in 4 bit, which is not supported: config.json does not name it in "
            "llm_int8_skip_modules; give the 16-bit model it was made from"
        )
    expected = {}
    for name in _names_in_4_bit(model):
        module, weight = model.get_submodule(name), f"{name}.weight"
        shape = tuple(module.weight.shape)
        found = checkpoint.in_files(weight, model.base_model_prefix) or weight
        expected[found] = shape[::-1] if is_conv1d(module) else shape
    prequantized.refuse_other_codes(checkpoint, model.config, expected)


def on_meta(config, trust_remote_code=False):
    """Return the model of a transformers config, with shapes and without numbers.

    Raises:
        InputError: no model can be built of these sizes.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    except (
        Exception
    ) as error:  # an architecture computes with what its config says: sizes below zero, names of functions
        raise InputError(
            f"{Path(config.name_or_path) / 'config.json'}: no model can be built of it: {said(error)}"
        ) from error
    return accept_arguments(model)


def load_on_meta(config, section, quantization, dtype=DTYPE_WHEN_QUANTIZED, codes=True):
    """Return the model that `load` returns for this config, its 4-bit layers too, with shapes and without numbers.

    config: the transformers config, grown to the new tokens, see `load_config`. codes: False for 4-bit layers that are not
    quantized yet, as transformers makes them on the meta device.
    """
    from bitsandbytes.nn import Linear4bit

    model = on_meta(config, section.trust_remote_code)
    float32 = quantization and quantization.compute_dtype == "float32"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if float32 else dtype)
    if quantization:
        for name in _names_in_4_bit(model):
            old = model.get_submodule(name)
            num_in, num_out = old.weight.shape if is_conv1d(old) else reversed(old.weight.shape)
            bias, compute_dtype = old.bias is not None, dtype_of(quantization.compute_dtype)
            new = Linear4bit(num_in, num_out, bias, compute_dtype, quant_type=quantization.quant_type, device="meta")
            new.bias = old.bias
            if codes:
                new.weight = _weight_on_meta(num_in, num_out, quantization, torch.float32 if float32 else dtype)
            new.support_avx512bf16_for_cpu = False
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new)
        model.is_loaded_in_4bit = True  # what PEFT chooses its layers by
    if section.attn_implementation != "auto":
        model.set_attn_implementation(section.attn_implementation)
    model.requires_grad_(False)
    return model.eval()


def _weight_on_meta(num_in, num_out, quantization, dtype):
    """Return the Params4bit (num_out, num_in): codes, and the constants that double quantization has of them."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Params4bit

    def on_meta(count, dtype=torch.float32):
        return torch.empty(count, dtype=dtype, device="meta")

    count = num_in * num_out
    num_blocks = -(-count // 64)
    shared = {"shape": torch.Size((num_out, num_in)), "blocksize": 64, "quant_type": quantization.quant_type}
    if quantization.use_double_quant:
        nested = QuantState(on_meta(-(-num_blocks // 256)), code=on_meta(256), blocksize=256, dtype=torch.float32)
        shared |= {"offset": on_meta(()), "state2": nested}
    absmax = on_meta(num_blocks, torch.uint8 if quantization.use_double_quant else torch.float32)
    state = QuantState(absmax, code=on_meta(16), dtype=dtype, **shared)
    codes = on_meta((-(-count // 2), 1), torch.uint8)
    weight = Params4bit(codes, False, state, quant_type=quantization.quant_type, bnb_quantized=True)
    weight.__deepcopy__ = lambda memo: weight  # bitsandbytes 0.50.2 can copy only to a CPU; PEFT's DoRA makes a copy
    return weight


def tensors(model):
    """Return all tensors that a plain or PEFT model holds: parameters, buffers, and the constants of 4-bit weights."""
    states = [module.weight.quant_state for module in quantized_modules(model).values()]
    states += [state.state2 for state in states if state.nested]
    constants = [tensor for state in states for tensor in (state.absmax, state.code, getattr(state, "offset", None))]
    return [t for t in (*model.parameters(), *model.buffers(), *constants) if t is not None]


def decoder_layers(model):
    """Return the list of decoder layers of a plain, PEFT or multimodal model: the module list with most parameters."""
    is_whole = model.config.get_text_config() is not model.config  # a vision tower has layers too
    inside = model.get_decoder() if is_whole else model
    lists = [module for module in inside.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()))


def token_modules(model):
    """Return the names of the modules that have a row a token: the embedding, and the head if it is not tied to that.

    Raises:
        InputError: PEFT cannot train single rows of them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or not isinstance(embedding, torch.nn.Embedding):
        raise InputError(
            f"model.new_tokens: {type(model).__name__} has no plain embedding and head whose rows could be trained"
        )
    if head.bias is not None:  # TrainableTokensLayer computes F.linear(x, W): peft 0.21
        raise InputError(
            f"model.new_tokens: the head of {type(model).__name__} has a bias, which PEFT loses where it trains rows; "
            "leave model.new_tokens out, or take another model"
        )
    names = {module: name for name, module in model.named_modules()}
    return [names[embedding], *([] if head.weight is embedding.weight else [names[head]])]


def to_float32(model):
    """Compute in float32 from now on, in place: exact NF4 values (not rounded to bfloat16), all else upcast.

    dequantize_4bit rounds to `quant_state.dtype`, the dtype W had; in float32 the KL of a faithful merge is 3e-6
    instead of 2e-4 (measured, SmolLM2-135M).
    """
    # transformers refuses its own .float() on a quantized model; codes are uint8 and stay
    model._apply(lambda tensor: _upcast(tensor) if tensor.is_floating_point() else tensor)
    for module in quantized_modules(model).values():
        module.compute_dtype = torch.float32
        module.weight.quant_state.dtype = torch.float32
    return model


def stand_in(shape, dtype, device):
    """Return a tensor that has shape, dtype and device of a weight, takes no memory and survives to_float32 so."""
    return torch.zeros(1, dtype=dtype, device=device).as_strided(shape, [0] * len(shape))


def replace_by_stand_ins(model):
    """Put a stand-in on the CPU in the place of every parameter of a model on the meta device."""
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                made = stand_in(parameter.shape, parameter.dtype, "cpu")
                module._parameters[leaf] = torch.nn.Parameter(made, requires_grad=False)


def is_stand_in(tensor):
    return tensor.dim() > 0 and not any(tensor.stride())


def _upcast(tensor):
    if is_stand_in(tensor):
        return tensor[(0,) * tensor.dim()].float().as_strided(tensor.shape, tensor.stride())
    return tensor.float()


def num_parameters(model):
    """Return (trainable, total) counts; a 4-bit weight counts as the numbers it stands for, a tied one once."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return trainable, total
