"""The memory of a model with its adapters: what it holds, and what a step adds, for any micro-batch."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

import numpy as np
import torch

from .. import base_model, methods
from ..kernels import checkpointing, groups
from ..recipe.optimizers import OPTIMIZERS
from ..system.errors import QLoRAError
from . import images, trace
from .speed import Work
from .together import ALONE, NCCL_BYTES

# Assumed, not measured: what the CUDA driver and the libraries' kernels take beside torch's own allocations, and what
# torch's allocator loses to rounding (blocks of 512 bytes and of 2 MiB) and to holes, as a share of a step's tensors.
CONTEXT_BYTES, LOST_SHARE = 512 * 2**20, 0.03
# On a CPU: what is imported and read after the plan; holes of the heap as a share of the layers' tensors, and of what
# checkpointed layers would keep. Measured by scripts/measure_plan.py, docs/plan.md.
_HELD_ON_CPU, LOST_SHARE_ON_CPU, _LOST_OF_CHECKPOINTED = 50 * 2**20, 0.33, 0.15
_PAGED_FROM = 100_000  # numbers in a tensor whose states bitsandbytes 0.50.2 pages


class NoPlan(Exception):
    """The model cannot be planned: traced on the meta device, layer by layer; says why."""


@dataclass(frozen=True)
class Load:
    """A micro-batch at its largest. rows: of length `length`, padding counted; scored: its trained positions. joined: the
    rows are one row without padding. document: the longest that is attended to by itself; None: as long as a row; attended:
    that of a token, in the mean. alone: it is the only one of its step; None: where a step has one by the recipe. pairs: two
    sequences belong together, which no micro-batch parts."""

    rows: int
    length: int
    scored: int
    packed: bool = False
    joined: bool = False
    document: int | None = None
    attended: float | None = None
    alone: bool | None = None
    pairs: bool = False

    @property
    def joins_steps(self):
        """Whether it is made of the rows of a step: `training.tokens_per_micro_batch: auto`."""
        return self.alone is not None

    @property
    def tokens(self):
        return self.rows * self.length

    @property
    def longest(self):
        """The length that data.max_length cuts: of the longest row, or of a pack."""
        return self.document if self.joined and not self.packed and self.document else self.length

    @property
    def is_padded(self):
        """Whether it has rows of unlike length, whose padding a mask keeps from being attended to."""
        return self.rows > 1 and not (self.packed or self.joined)


@dataclass(frozen=True)
class Usage:
    """Memory at the moment of the peak. components: bytes by name, which sum to peak_bytes; host_bytes: beside that;
    paged_bytes: of optimizer states that the CUDA driver holds, not torch."""

    components: dict
    where: str
    host_bytes: int
    paged_bytes: int

    @property
    def peak_bytes(self):
        return sum(self.components.values())

    @property
    def allocated_bytes(self):
        """The tensors alone: what torch's counters and memory.LiveTensors measure."""
        return self.peak_bytes - self.components["context"]


@dataclass(frozen=True)
class Outline:
    """joins: rows are joined without padding. weights: bytes. trained: numbers in each trained tensor. trained_bytes: all
    of them, as the model holds them; layer_gradients: {kind of layer: bytes}. read_bytes: beside the weights while
    the largest of them is read. work: for its speed. mapped: bytes of the weights that stay mapped files on a CPU. counts: what
    a row's length is a number of, tokens or images. embedded: virtual tokens before each row. shared: of a token, the numbers
    of keys and values that queries share, and that attention with a mask has for each. codes: bytes of each 4-bit weight, in a
    tuple for each decoder layer.
    """

    device_kind: str
    joins: bool
    weights: int
    trained: np.ndarray
    trained_bytes: float
    layer_gradients: dict
    read_bytes: int
    step: trace.Step
    work: Work
    mapped: int = 0
    counts: str = "tokens"
    embedded: int = 0
    shared: int = 0
    codes: tuple = ()

    @property
    def num_layers(self):
        return len(self.step.layers)

    def blend(self, other, share):
        """Return the outline of a rank between those of two: share 0 is this one, 1 is `other`, 2 as far beyond."""

        def between(a, b):
            return a + share * (b - a)

        kinds = self.layer_gradients
        return dataclasses.replace(
            self,
            trained=np.round(between(self.trained, other.trained)),
            trained_bytes=between(self.trained_bytes, other.trained_bytes),
            layer_gradients={kind: between(kinds[kind], other.layer_gradients[kind]) for kind in kinds},
            step=self.step.blend(other.step, share),
            work=dataclasses.replace(self.work, lora=round(between(self.work.lora, other.work.lora))),
        )


def outline(config, model_section, quantization, lora, num_new_tokens, device_kind, packed, kernels="auto"):
    """Return the Outline of what these recipe sections describe; takes about a second and no weights.

    config: the transformers config, grown to the new tokens. device_kind: "cuda" or "cpu". kernels: the recipe's setting.

    Raises:
        InputError: the adapter does not go with the model, see methods.attach.
        NoPlan: the model does something on the way that cannot be done without numbers.
    """
    try:
        return _outline(config, model_section, quantization, lora, num_new_tokens, device_kind, packed, kernels)
    except (QLoRAError, NoPlan):
        raise
    except Exception as error:  # anything, of any architecture's own code on the meta device
        raise NoPlan(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def _outline(config, model_section, quantization, lora, num_new_tokens, device_kind, packed, kernels):
    model = base_model.load_on_meta(config, model_section, quantization)
    layer = base_model.decoder_layers(model)[0]
    if not checkpointing.is_possible(layer):
        raise NoPlan(f"{type(layer).__name__} cannot be checkpointed")
    quantized = [module.weight for module in base_model.quantized_modules(model).values()]
    codes = base_model.code_bytes(model)
    stay_mapped = device_kind == "cpu" and _stay_mapped(config, num_new_tokens)
    read_bytes = _read_bytes(model, config, num_new_tokens, device_kind, stay_mapped)
    linear = [model.get_submodule(name) for name in base_model.linear_names(model)]
    base = sum(base_model.numel(module.weight) for module in linear)
    answering = model.get_output_embeddings()
    head = 0 if answering is None else answering.weight.numel()
    of_images = not base_model.task_of(model).HAS_TOKENS
    positions = images.positions(model) if of_images else 1.0
    peft_model = methods.attach(model, lora, token_ids=range(num_new_tokens))
    step, joins = trace.trace(peft_model, device_kind, packed, kernels)
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    layers = base_model.decoder_layers(peft_model)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    heads = heads if isinstance(heads, int) else 1  # Swin has a number for each stage
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    own = getattr(text, "num_key_value_heads", None) or heads
    return Outline(
        device_kind,
        joins,
        base_model.num_bytes(base_model.tensors(peft_model)) - base_model.num_bytes(trained),
        np.array([parameter.numel() for parameter in trained], dtype=float),
        base_model.num_bytes(trained),
        {
            kind: base_model.num_bytes(p for p in layer.parameters() if p.requires_grad)
            for kind, layer in zip(step.layers, layers)  # noqa: B905
        },
        read_bytes,
        step,
        Work(
            base,
            sum(p.numel() for p in trained if p.dim() == 2),
            head,
            len(layers),
            heads * head_dim,
            bool(quantization),
            positions,
        ),
        _mapped_bytes(peft_model, quantized) if stay_mapped else 0,
        "images" if of_images else "tokens",
        lora.num_embedded,
        2 * head_dim * (heads - own if isinstance(own, int) and own > 1 else 0),  # one is shared without a copy
        codes,
    )


def _stay_mapped(config, num_new_tokens):
    """True if weights that are not quantized are left as the files have them, mapped, where their dtype is bfloat16."""
    stored = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    rewritten = num_new_tokens or base_model.stored_quantization(config)
    return stored == torch.bfloat16 and sys.platform != "darwin" and not rewritten


def _mapped_bytes(peft_model, quantized):
    """Return the bytes of weights that stay mapped: the system takes such pages back, so they are not counted as held
    (memory.Peak); on macOS they are. One that is trained becomes the process's own when the first step writes it."""
    others = {id(weight) for weight in quantized}
    frozen = (p for p in peft_model.parameters() if not p.requires_grad and id(p) not in others)
    return base_model.num_bytes(p for p in frozen if p.dtype == torch.bfloat16)


def _read_bytes(model, config, num_new_tokens, device_kind, stay_mapped):
    """Return what the largest weight needs while it is read: bfloat16; quantized on a CPU float32 copies too, unless the files
    hold codes. An embedding is not quantized, and may stay a mapped file.
    """
    largest = max(map(base_model.numel, model.parameters()))
    found = 0 if stay_mapped else 2 * largest
    if device_kind == "cpu":
        quantized = base_model.quantized_modules(model).values()
        if quantized and not base_model.stored_quantization(config):
            found = max(found, 16 * max(base_model.numel(module.weight) for module in quantized))
        if num_new_tokens:  # base_model.add_rows: a larger table, and its mean in float32
            found = max(found, 6 * largest)
    return found


def usage(model: Outline, load: Load, training, checkpointed, offload, eval_load=None, together=ALONE) -> Usage:
    """Return the Usage of training `model` with the recipe's section `training`, a micro-batch being `load` at most.

    checkpointed: how many layers, from the first, are computed again in the backward pass. offload: whether the inputs that
    those keep go to the host, but for two. eval_load: the largest batch of an evaluation, if there is one. together: the
    Together of which this is one process.

    The step before is past: the optimizer has its states, and with several micro-batches a step their gradients are there.
    """
    on_cuda = model.device_kind == "cuda"
    mastered = together.mastered(model.trained)
    numbers, largest = float(mastered.sum()), float(mastered.max())
    accumulates = training.gradient_accumulation_steps > 1 if load.alone is None else not load.alone
    elsewhere = dataclasses.replace(together, offload=together.offload and on_cuda).held_elsewhere(model.codes)
    always = {
        "weights": model.weights - model.mapped - elsewhere,
        "adapter": model.trained_bytes + 4 * numbers,  # and training.master_weights
        "optimizer": _optimizer_bytes(mastered, training.optim),
    }
    summed = 4 * numbers if accumulates else 0.0
    moments = [*_step(model, load, checkpointed, offload, summed)]
    taken = _taken_over(model, summed, numbers if together.shares else None)
    moments.append(("copying gradients to the masters", {"gradients": taken}))
    temporary = _optimizer_work(model, numbers, largest, training.optim)
    moments.append(("optimizer step", {"gradients": 4 * numbers, "layer_work": temporary}))
    if eval_load is not None:
        moments.append(("evaluation", _evaluation(model, eval_load)))
    where, parts = max(moments, key=lambda moment: sum(moment[1].values()))
    worked = sum(parts.get(name, 0) for name in ("checkpoints", "layer_work", "buffers"))
    loss_head = parts.get("loss_head", 0)
    lost = CONTEXT_BYTES + LOST_SHARE * (worked + loss_head)
    if not on_cuda:  # logits of a large vocabulary are blocks of their own, which leave no holes
        lost = _lost_on_cpu(model, load, checkpointed, worked)
    loading = always["weights"] + model.read_bytes
    if loading > sum(always.values()) + sum(parts.values()) + (0 if on_cuda else lost):
        where, always, parts = "loading", {"weights": always["weights"]}, {"buffers": model.read_bytes}
        lost = CONTEXT_BYTES + LOST_SHARE * model.read_bytes if on_cuda else 0
    names = ("weights", "adapter", "gradients", "optimizer", "checkpoints", "layer_work", "loss_head", "buffers")
    found = {name: round(always.get(name, 0) + parts.get(name, 0)) for name in names}
    found["context"] = round(lost) + (NCCL_BYTES if on_cuda and together.count > 1 else 0)
    kept = model.step.checkpointed[model.step.layers[-1]][0].rise_and_change(_growth(model, load))[1]
    host_bytes = round(kept) * checkpointed if offload else 0
    if on_cuda and offload:
        host_bytes = -(-round(kept) // checkpointing.PIECE) * checkpointing.PIECE * checkpointed
    if on_cuda:
        host_bytes += together.pinned_bytes(model.codes)
    else:  # the host's memory is the one there is
        found["checkpoints"], host_bytes = found["checkpoints"] + host_bytes, 0
    large = mastered[mastered >= _PAGED_FROM]
    paged = on_cuda and OPTIMIZERS[training.optim].paged and where != "loading"
    paged_bytes = round(_optimizer_bytes(large, training.optim)) if paged else 0
    return Usage(found, where, host_bytes, paged_bytes)


def _taken_over(model, summed, mastered=None):
    """Return the bytes of gradients when the masters take the model's over, group by group, each as a float32 copy that is added
    or kept; summed: those of earlier micro-batches. mastered: numbers that have a master here, where that is not all."""
    if mastered is not None:  # a piece at a time goes to its owner
        return model.trained_bytes + 4 * mastered + 4 * min(groups.SENT, mastered)
    parts_of = groups.of(model.trained, model.device_kind == "cuda")
    trained = np.array([model.trained[part].sum() for part in parts_of])
    left = model.trained_bytes / model.trained.sum() * np.cumsum(trained[::-1])[::-1]
    before = 0.0 if summed else 4 * (np.cumsum(trained) - trained)
    return summed + (left + before + 4 * trained).max()


def _lost_on_cpu(model, load, checkpointed, worked):
    """Return what a step takes beside its tensors. worked: bytes of these that are no state, but for the loss.

    A layer that is computed again is allocated among what is left of the layers after it: measured, one more of it, and a share
    of all that the checkpointed layers free in the forward pass.
    """
    growth, step = _growth(model, load), model.step
    again = step.layers[:checkpointed]
    kept = sum(step.plain[kind][0].rise_and_change(growth)[1] for kind in again)
    rise = step.checkpointed[again[-1]][1].rise_and_change(growth)[0] if again else 0.0
    return _HELD_ON_CPU + LOST_SHARE_ON_CPU * worked + _LOST_OF_CHECKPOINTED * kept + rise


def _growth(model, load):
    apart, padded = not (load.packed or load.joined), model.step.padded
    # the trace has those before one row
    tokens = load.tokens + (load.rows - 1) * model.embedded if apart else load.tokens
    squared = tokens * load.length if apart and not padded else tokens**2
    head = model.step.at_once(load.scored)
    return trace.growth(tokens, load.scored, head, load.document or load.length, padded, squared)


def _mask(model, load):
    """Return (bytes of the mask of rows of unlike length, what attention keeps of it in each layer), beside what the trace has.

    A layer makes a number of each bool, and has keys and values for each query.
    """
    if model.step.masked or not load.is_padded:
        return 0, 0
    numbers = load.rows * (load.length + model.embedded) ** 2
    tokens = load.rows * (load.length + model.embedded)
    return numbers, 0 if model.step.padded else 2 * (numbers + tokens * model.shared)  # padded rows: in their trace


def _with_mask(pair, kept, checkpointed):
    """Return the ((rise, change) forward, (rise, change) backward) of a layer that has `kept` bytes more until it is passed."""
    (rise, change), (rise_back, change_back) = pair
    if checkpointed:
        return (rise + kept, change), (rise_back + kept, change_back)
    return (rise + kept, change + kept), (rise_back, change_back - kept)


def _step(model, load, checkpointed, offload, summed):
    """Yield (where, parts) of the highest moment in each segment of a forward and backward pass."""
    growth, step, num = _growth(model, load), model.step, model.num_layers
    each = [
        {kind: [segment.rise_and_change(growth) for segment in pair] for kind, pair in pairs.items()}
        for pairs in (step.plain, step.checkpointed)
    ]
    mask, kept = _mask(model, load)
    ways = [
        _with_mask(each[index < checkpointed][kind], kept, index < checkpointed)
        for index, kind in enumerate(step.layers)
    ]
    rise, buffers = step.embedding.rise_and_change(growth)
    level, checkpoints, gradients = buffers, 0.0, 0.0
    one = ways[checkpointed - 1][0][1] if checkpointed else 0.0

    def moment(where, rise, at_hand, kind="layer_work"):
        """at_hand: checkpoints that exist."""
        away = max(0, at_hand - 2) * one if offload else 0.0
        parts = {"gradients": summed + gradients, "checkpoints": checkpoints - away, "buffers": buffers + mask}
        parts["layer_work"] = level - checkpoints - gradients - buffers
        parts[kind] = parts.get(kind, 0.0) + rise
        return where, parts

    yield moment("embedding", rise - buffers, 0)
    for index, (forward, _) in enumerate(ways):
        yield moment(f"forward of layer {index + 1}", forward[0], min(index, checkpointed))
        level += forward[1]
        checkpoints += forward[1] if index < checkpointed else 0.0
        if index == checkpointed > 0:  # a layer that is not lets go of the input of the one before: here that is kept
            level += one
    rise, change = each[checkpointed == num]["head"][1]
    yield moment("loss head", rise, checkpointed, "loss_head")
    level += change
    for index in reversed(range(num)):
        forward, backward = ways[index]
        yield moment(f"backward of layer {index + 1} of {num}", backward[0], min(index + 1, checkpointed))
        level += backward[1]
        checkpoints -= forward[1] if index < checkpointed else 0.0
        gradients += model.layer_gradients[step.layers[index]]


def _evaluation(model, load):
    """Return the parts of the highest moment of an evaluation: nothing is kept for a backward pass, no logits gathered."""
    growth, step = _growth(model, load), model.step
    _, buffers = step.embedding.rise_and_change(growth)
    layer, hidden = (
        max(step.checkpointed[kind][0].rise_and_change(growth)[i] for kind in set(step.layers)) for i in (0, 1)
    )
    head = step.checkpointed["head"][0].rise_and_change(growth)[0] + hidden
    mask, kept = _mask(model, load)
    work = {"loss_head": head} if head > layer + kept else {"layer_work": layer + kept}
    return {"buffers": buffers + mask} | work


def _optimizer_bytes(trained, optim):
    """Return the bytes of the optimizer's states for tensors of these many numbers.

    bitsandbytes 0.50.2, optim/optimizer.py: tensors under 4,096 numbers stay in 32 bit; a float32 for each block of 256.
    """
    kept = OPTIMIZERS[optim]
    if kept.bits == 32:
        return kept.states * 4 * trained.sum()
    small = trained < 4096
    return kept.states * (np.where(small, 4 * trained, trained + 4 * np.ceil(trained / 256))).sum()


def checkpoint_bytes(model: Outline, optim):
    """Return the bytes of a checkpoint of this training on the disk: float32 weights and the optimizer's state."""
    return round(4 * float(model.trained.sum()) + float(_optimizer_bytes(model.trained, optim)))


def _optimizer_work(model, numbers, largest, optim):
    """Return what a step of the optimizer needs for itself."""
    if model.device_kind == "cpu":
        return 12 * largest  # one tensor at a time, in float32
    return 4 * numbers if OPTIMIZERS[optim].copies_all else 0.0
