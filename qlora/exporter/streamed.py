"""Models that are computed from their files: one decoder layer in memory at a time.

The proof compares the same two models as with both held whole: the live one is quantized by bitsandbytes and adapted by
PEFT as at training, the exported one is opened by transformers, and each runs its own forward. Only the weights come and
go: those of a decoder layer are read before it is called and dropped after, of the embedding the rows asked for are read,
and the head goes through the vocabulary piece by piece. The merge's own arithmetic has no part in it.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from safetensors import safe_open

from .. import base_model
from ..base_model import prequantized
from ..base_model.quantized import BLOCKSIZE
from ..evaluation import metrics
from ..system.errors import InputError
from . import proof

_HEAD_BYTES = 32 * 2**20  # of the head in memory at a time
_ACTIVATION_BYTES = 512 * 2**20  # of one layer on the rows that go through together, unless one row takes more
_SLACK_BYTES = 32 * 2**20  # freed, and kept by the C library: pieces of up to 32 MiB
_NF4_BYTES = 0.5 + 4 / BLOCKSIZE  # a weight: a code, and the block's absmax before it is quantized itself
_QUANTIZING_BYTES = 18  # a weight, measured on the CPU (bitsandbytes 0.50.2): 14, cast before 16, transposed 2 more


def exported(folder, device, trust_remote_code=False):
    """Return the model in `folder` in float32 on `device`, streamed; proof.reload holds the same one whole.

    Raises:
        ProofFailed: transformers finds a tensor missing, left over or of another shape.
        InputError: it would convert tensors while loading.
    """
    model = proof.open_folder(folder, torch.device("meta"), trust_remote_code=trust_remote_code)
    files = base_model.weight_files(folder)
    checkpoint = base_model.Checkpoint(str(folder), folder, None, files)
    source = checkpoint.half.whole if checkpoint.half else checkpoint.text_tensors
    _stream(model, _Weights(model, checkpoint, source), device)
    return model


def live(checkpoint, section, quantization, device, source, dtype=base_model.DTYPE_WHEN_QUANTIZED):
    """Return the frozen model of `checkpoint` on `device`, streamed, for methods.load; base_model.load holds it whole.

    source: {parameter: name of its tensor in the files}. With new tokens embedding and head are held whole, as PEFT needs
    them. Adapters, and whatever else is put in the place of a weight, stay in memory.

    Raises:
        InputError: as base_model.load does; or transformers would convert tensors while loading.
    """
    if quantization:  # nothing can be upcast on the meta device; proof.Live does it
        quantization = quantization.model_copy(update={"compute_dtype": "bfloat16"})
    bare = dataclasses.replace(checkpoint, new_tokens={}, added=frozenset())
    model = base_model.load(bare, section, quantization, torch.device("meta"), dtype)
    weights = _Weights(model, checkpoint, source)
    _stream(model, weights, device, whole_ends=bool(checkpoint.new_tokens))
    if checkpoint.new_tokens:
        num_rows = base_model.load_config(checkpoint, section).get_text_config().vocab_size
        base_model.add_rows(model, checkpoint.added, num_rows)
    return model.requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class Need:
    """What a proof takes at most, in bytes beside Python, its libraries and mapped files (which the system may drop).

    whole: both models held whole, one after the other; streamed: as here. tokens_at_once: for proof.Live, streamed.
    num_passes: how often a model is read from disk, streamed.
    """

    whole: int
    streamed: int
    tokens_at_once: int
    num_passes: int


def need(config, rows, quantized, adapter=None, new_tokens=False, trust_remote_code=False, num_kept=0):
    """Return the Need of a proof on `rows`, from shapes alone.

    config: of the model, with the rows of new tokens. quantized: names of the layers in NF4. adapter: a methods.Adapter, or
    None. num_kept: numbers in the part of a multimodal model that is not text, which is held whole in the exported one.
    """
    model = base_model.on_meta(config, trust_remote_code)
    nf4 = {model.get_submodule(name).weight for name in quantized}
    head = model.get_output_embeddings().weight
    ends = {model.get_input_embeddings().weight, head}
    layers = [set(layer.parameters()) for layer in base_model.decoder_layers(model)]
    total, largest = set(model.parameters()), max(p.numel() for layer in layers for p in layer)
    apart = total.difference(ends, *layers)

    columns = proof.columns(rows, len(head))
    longest = max(len(row.input_ids) for row in rows)
    per_token = _activation_bytes(model, longest)
    tokens_at_once = _ACTIVATION_BYTES // per_token
    batches = proof.batches(rows, tokens_at_once)
    num_tokens = max(len(batch) * max(len(rows[number].input_ids) for number in batch) for batch in batches)

    def live(parameters):
        return int(sum(p.numel() * (_NF4_BYTES if p in nf4 else 4) for p in parameters))

    def exported(parameters):
        return 4 * sum(p.numel() for p in parameters)

    def of_head(num_positions):  # logits, with two copies where the model caps them; then pieces of those in metrics
        return len(head) * (12 * num_positions + 48 * metrics.POSITIONS_AT_ONCE) + 3 * min(
            _HEAD_BYTES, 4 * head.numel()
        )

    computing = 4 * largest + num_tokens * per_token  # a layer in float32 for the time that it is used
    quantizing = _QUANTIZING_BYTES * largest if nf4 else 0
    more = 8 * adapter.num_parameters if adapter else 0
    more += 4 * head.numel() if new_tokens else 0  # ... and the rows in a copy
    head_alone, head_together = (
        of_head(max(sum(len(columns[number]) for number in batch) for batch in some))
        for some in (proof.batches(rows, 0), batches)
    )
    kept = 4 * len(head) * sum(map(len, columns))
    whole = max(
        live(total) + more + max(quantizing, 4 * largest + longest * per_token, head_alone),
        exported(total) + 4 * num_kept + max(longest * per_token, head_alone),
    )
    streamed = max(
        live(apart | ends if new_tokens else apart)
        + (0 if adapter and adapter.is_whole else more)  # which is read like the base
        + int(_NF4_BYTES * largest)  # stand-ins
        + max(max(map(live, layers)) + max(quantizing, computing), head_together),
        exported(apart) + 4 * num_kept + max(max(map(exported, layers)) + computing, head_together),
    )
    whole, streamed = (int(1.1 * (kept + most)) + _SLACK_BYTES for most in (whole, streamed))
    return Need(whole, streamed, tokens_at_once, 3 * len(batches))


def _activation_bytes(model, num_tokens):
    """Return bytes a token that a decoder layer takes at most to compute rows of `num_tokens`, in float32."""
    config = model.config.get_text_config()
    wide = [max(p.shape[-2:]) for p in base_model.decoder_layers(model)[0].parameters() if p.dim() > 1]
    numbers = 8 * config.hidden_size + 2 * sum(wide) + 3 * max(wide) + 2 * num_tokens
    if config._attn_implementation == "eager":  # scores of all heads (Mamba has none), their softmax and a copy
        numbers += 3 * getattr(config, "num_attention_heads", 0) * num_tokens
    return 4 * numbers


class _Weights:
    """The files of a model that is on the meta device: its tensors by parameter name, in the dtype it has them in.

    instead: {parameter: tensor} that take the place of those in the files.
    """

    def __init__(self, model, checkpoint, source):
        from transformers.core_model_loading import WeightConverter

        self.tied, self.instead = base_model.tied(model), {}
        tied = {name: source[other] for name, other in self.tied.items() if other in source}
        self.source = {**tied, **source}
        self.checkpoint, folder, files = checkpoint, checkpoint.folder, checkpoint.files
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        converts = any(isinstance(one, WeightConverter) for one in getattr(model, "_weight_conversions", None) or ())
        if converts or any(self.source.get(name) not in files for name in self.dtypes):
            raise InputError(
                f"{folder}: the files hold {type(model).__name__} in another layout than it has in memory, so it cannot "
                "be read layer by layer; use --verify full"
            )

    def read(self, name, device, rows=slice(None)):
        """Return tensor `name`, or some rows of it; files are mapped, so that nothing else is read."""
        given = self.instead.get(self.tied.get(name, name))
        if given is not None:
            return given[rows].to(device)
        stored = self.source[name]
        with safe_open(self.checkpoint.folder / self.checkpoint.files[stored], "pt") as file:
            return file.get_tensor(stored)[rows].to(device).to(self.dtypes[name])


def _stream(model, weights, device, whole_ends=False):
    """Make `model`, which is on the meta device, one on `device` that reads layers, embedding and head from `weights`.

    Stand-ins (base_model.stand_in) take their places meanwhile; what is put in the place of a stand-in stays. What is put
    into `read_instead` of the model is read instead.
    whole_ends: hold embedding and head in memory, like everything else that is in no layer.
    """
    model.read_instead = weights.instead
    prefixes = {module: f"{name}." if name else "" for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {embedding, head} if not whole_ends and type(head) is torch.nn.Linear else set()
    _make_buffers(model, prefixes, weights, device)
    inside = set()
    for layer in base_model.decoder_layers(model):
        inside |= set(layer.modules())
        _read_on_entry(layer, {module: prefixes[module] for module in layer.modules()}, weights, device)
    stand_in, made = _stand_ins(model, device), {}
    for module, prefix in prefixes.items():
        for leaf, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:  # a parameter that two modules share stays shared
                # vectors (norms, biases) are no burden, and PEFT may want to train them
                away = parameter.dim() > 1 and (module in inside or module in ends)
                made[parameter] = (
                    stand_in(parameter) if away else _parameter(weights.read(prefix + leaf, device).clone())
                )
            module._parameters[leaf] = made[parameter]
    if ends:
        _read_rows(embedding, prefixes[embedding] + "weight", weights)
        head.forward = functools.partial(_in_pieces, head, prefixes[head] + "weight", weights)


def _parameter(tensor):
    return torch.nn.Parameter(tensor, requires_grad=False)


def _make_buffers(model, prefixes, weights, device):
    """Give `model` its buffers: those in the files are read, the others (rotary frequencies) made by transformers."""
    stored = []
    for module, prefix in prefixes.items():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = torch.empty_like(buffer, device=device)
                module._is_hf_initialized = False
                if leaf not in module._non_persistent_buffers_set:
                    stored.append((module, leaf, prefix + leaf))
    model.initialize_weights()  # does nothing to parameters: they are on the meta device
    for module, leaf, name in stored:
        module._buffers[leaf] = weights.read(name, device).clone()


def _stand_ins(model, device):
    """Return a function: parameter on the meta device -> its stand-in on `device`.

    That of an NF4 weight is an NF4 weight of zeros, so that what an adapter's initialisation computes from it, and
    loading then replaces (DoRA: the norms), is defined. All of them share one buffer.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type
    from bitsandbytes.nn import Params4bit

    quantized = [parameter for parameter in model.parameters() if isinstance(parameter, Params4bit)]
    codes = torch.zeros(max((-(-p.numel() // 2) for p in quantized), default=0), 1, dtype=torch.uint8, device=device)
    absmax = torch.zeros(max((-(-p.numel() // p.blocksize) for p in quantized), default=0), device=device)

    def stand_in(parameter):
        if not isinstance(parameter, Params4bit):
            return _parameter(base_model.stand_in(parameter.shape, parameter.dtype, device))
        settings = {name: getattr(parameter, name) for name in ("blocksize", "quant_type")}
        state = QuantState(
            absmax[: -(-parameter.numel() // parameter.blocksize)],
            shape=parameter.shape,
            dtype=parameter.dtype,
            code=get_4bit_type(parameter.quant_type, device=device),
            **settings,
        )
        return Params4bit(
            codes[: -(-parameter.numel() // 2)],
            quant_state=state,
            compress_statistics=parameter.compress_statistics,
            quant_storage=parameter.quant_storage,
            bnb_quantized=True,
            **settings,
        )

    return stand_in


def _read_on_entry(layer, prefixes, weights, device):
    """Hook `layer` so that its weights are read before its forward and dropped after.

    prefixes: {module of the layer: prefix of its parameters' names}, from before an adapter was put on.
    """
    from bitsandbytes.nn import Params4bit

    held = []

    def enter(layer, args):
        for module, prefix in prefixes.items():
            for leaf, stand_in in module._parameters.items():
                if isinstance(stand_in, Params4bit):
                    weight = _quantized(module, weights, prefix + leaf, device, stand_in)
                elif stand_in is not None and base_model.is_stand_in(stand_in):
                    weight = _parameter(weights.read(prefix + leaf, device).to(stand_in.dtype))
                else:
                    continue
                held.append((module, leaf, stand_in))
                module._parameters[leaf] = weight

    def leave(layer, args, output):
        while held:
            module, leaf, stand_in = held.pop()
            module._parameters[leaf] = stand_in

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave, always_call=True)


def _quantized(module, weights, name, device, stand_in):
    """Return weight `name` as training has it, to compute in the stand-in's dtype: the codes in the files, or those that
    transformers' Bnb4bitQuantize makes."""
    from bitsandbytes.nn import Params4bit
    from transformers.pytorch_utils import Conv1D

    settings = {name: getattr(stand_in, name) for name in ("blocksize", "quant_type", "quant_storage")}
    source = weights.source[name]
    if prequantized.holds_codes(weights.checkpoint, source):
        codes, state = prequantized.read(weights.checkpoint, source, device)
        settings |= {"compress_statistics": state.nested, "quant_state": state, "bnb_quantized": True}
        weight = Params4bit(codes, requires_grad=False, **settings)
    else:
        W = weights.read(name, device)
        W = W.T if issubclass(module.source_cls, Conv1D) else W
        settings["compress_statistics"] = stand_in.compress_statistics
        weight = Params4bit(W, requires_grad=False, **settings).to(device)
    weight.quant_state.dtype = stand_in.quant_state.dtype
    return weight


def _read_rows(embedding, name, weights):
    """Hook `embedding` so that it holds the rows of the ids it is asked for, and is asked by their place among these."""
    embedding.padding_idx = None  # has no part in a forward, but must be one of the rows
    held = []

    def enter(module, args):
        stand_in = module.weight
        if base_model.is_stand_in(stand_in):
            ids, places = args[0].unique(return_inverse=True)
            held.append(stand_in)
            module.weight = _parameter(weights.read(name, "cpu", ids.cpu()).to(stand_in))
            return (places, *args[1:])

    def leave(module, args, output):
        if held:
            module.weight = held.pop()

    embedding.register_forward_pre_hook(enter)
    embedding.register_forward_hook(leave, always_call=True)


def _in_pieces(head, name, weights, hidden):
    """Return what nn.Linear.forward of `head` returns, with some rows of its weight in memory at a time."""
    linear = torch.nn.functional.linear
    if not base_model.is_stand_in(head.weight):
        return linear(hidden, head.weight, head.bias)
    num_rows, width = head.weight.shape
    logits = hidden.new_empty(*hidden.shape[:-1], num_rows)
    step = max(1, _HEAD_BYTES // (4 * width))
    for start in range(0, num_rows, step):
        rows = slice(start, start + step)
        weight = weights.read(name, hidden.device, rows).to(hidden.dtype)
        logits[..., rows] = linear(hidden, weight, None if head.bias is None else head.bias[rows])
    return logits
