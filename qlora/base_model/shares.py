"""A base that several processes hold together: each has a share of the 4-bit codes of every decoder layer, and torch's
fully_shard (FSDP2) gathers a layer's codes before it computes, forward and backward.

The codes stay uint8, what one process has, digests included. FSDP1 cannot shard integers, hence bitsandbytes' quant_storage; in
bfloat16 codes that happen to be NaNs may be changed on the way (bitsandbytes #1945). The constants of the blocks (0.127 bits
a weight), embeddings, head and norms stay whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..system.errors import InputError
from .layers import decoder_layers
from .quantized import as_recorded, digest, quantized_modules

_QUANTIZER = "bitsandbytes_4bit"


@dataclass(frozen=True)
class Share:
    """Which share this process holds. recorded: {name: digest}, see quantized.restore_codes. offload: in CPU memory."""

    rank: int
    count: int
    recorded: Mapping = field(default_factory=dict)
    offload: bool = False

    def of(self, codes):
        """Return a copy of the rows of `codes` that are this process's, as fully_shard splits them; none for the last where the
        others have all."""
        parts = codes.chunk(self.count)
        mine = parts[self.rank].clone() if self.rank < len(parts) else codes[:0].clone()
        return mine.cpu() if self.offload else mine


@contextlib.contextmanager
def taken(share, codes_in=None):
    """Let transformers keep in the block, of each 4-bit weight that it has quantized, `share` alone; None: the whole of it.

    So a process has one whole weight at a time. The quantizer is replaced in transformers' table, because register_quantizer
    takes new names alone, and PEFT and the Trainer know this one.

    Raises:
        InputError: the files hold codes already, in the folder `codes_in`.
    """
    if share is None:
        yield
        return
    if codes_in is not None:
        raise InputError(
            f"{codes_in}: memory.sharding is for weights in 16 bit, and these are in 4 bit already; take the checkpoint that "
            "they were made of, or leave memory.sharding out"
        )
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    class Quantize(Bnb4bitQuantize):
        def convert(self, input_dict, model=None, **settings):
            made, layers = super().convert(input_dict, model=model, **settings), set(_modules(decoder_layers(model)))
            for name, weight in made.items():
                _keep(model, name.removesuffix(".weight"), weight, share, layers)
            return made

    class Quantizer(AUTO_QUANTIZER_MAPPING[_QUANTIZER]):  # type: ignore[misc]
        def get_quantize_ops(self):
            return Quantize(self)

    before = AUTO_QUANTIZER_MAPPING[_QUANTIZER]
    AUTO_QUANTIZER_MAPPING[_QUANTIZER] = Quantizer
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING[_QUANTIZER] = before


def _keep(model, name, weight, share, layers):
    """Leave in a Params4bit, if its module is in one of the layers, the share of its codes; note in the module what they were."""
    module = model.get_submodule(name)
    codes = weight.data
    if name in share.recorded:
        found = as_recorded(codes, share.recorded[name])
        codes = codes if found is None else found
    module.digest_of_codes = digest(codes)
    if module in layers:
        module.shape_of_codes = codes.shape
        codes = share.of(codes)
    weight.data = codes


def gather_in_layers(model, offload=False):
    """Let each decoder layer of a plain model that was loaded with a Share gather its codes while it computes.

    All processes must then call the layers equally often. Everything else is each process's own: nothing is reduced. offload:
    keep the shares in CPU memory, pinned, from where a layer's is copied to the GPU before it is gathered.

    Raises:
        InputError: no layer has a share.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard

    shared = [module for module in quantized_modules(model).values() if hasattr(module, "shape_of_codes")]
    if not shared:
        raise InputError(
            "memory.sharding: no 4-bit layer is in a decoder layer, so there is nothing to share; leave it out"
        )
    mesh, held = DeviceMesh.from_group(dist.group.WORLD, model.device.type), [module.weight for module in shared]
    layers = decoder_layers(model)
    for module, weight in zip(shared, held, strict=True):
        module.quant_state = weight.quant_state  # bitsandbytes takes it from here where the weight is a plain one
        empty = torch.empty(module.shape_of_codes, dtype=weight.dtype, device="meta")
        module.weight = torch.nn.Parameter(empty, requires_grad=False)
    sharded = {id(module.weight) for module in shared}
    whole = {parameter for parameter in model.parameters() if id(parameter) not in sharded}
    decoder = next(module for module in model.modules() if any(child is layers for child in module.children()))
    for part in (*layers, decoder):  # the decoder last: it has the streams that the layers share
        # without a GPU there is nothing to pin for
        policy = CPUOffloadPolicy(pin_memory=model.device.type == "cuda") if offload else OffloadPolicy()
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole, offload_policy=policy)
    for module, weight in zip(shared, held, strict=True):
        there = module.weight
        share = DTensor.from_local(
            weight.data, mesh, [Shard(0)], run_check=False, shape=there.shape, stride=there.stride()
        )
        module.weight = torch.nn.Parameter(share.cpu() if offload else share, requires_grad=False)
        for name in (
            "quant_state",
            "compress_statistics",
            "quant_type",
            "quant_storage",
            "blocksize",
        ):  # PEFT asks for them
            setattr(module.weight, name, getattr(weight, name))


def is_gathered(model):
    """Whether `gather_in_layers` was called for a plain or PEFT model, or a layer of it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


@contextlib.contextmanager
def gathered(model, module):
    """Hold in the block all codes of the decoder layer that `module` is in, if they are in shares; in all processes at once."""
    there = decoder_layers(model) if is_gathered(model) else ()
    layers = [layer for layer in there if any(part is module for part in layer.modules())]
    for layer in layers:
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()


def code_bytes(model):
    """Return the bytes of each 4-bit weight that is shared, ((weight, ...) of a decoder layer, ...)."""
    in_4_bit = {id(module): module for module in quantized_modules(model).values()}
    return tuple(
        tuple(one.weight.numel() * one.weight.element_size() for one in layer.modules() if id(one) in in_4_bit)
        for layer in decoder_layers(model)
    )


def _modules(layers):
    return (module for layer in layers for module in layer.modules())
