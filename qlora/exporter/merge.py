"""Merge arithmetic: dequantize(NF4(W)) + what the adapter does to it, in float32, cast once, a few rows at a time.

The base is the NF4 weight that the adapter was trained against, not the 16-bit weight of the files: B A was fitted on
top of the quantized model, and W + scaling * B A is another function (measured on SmolLM2-135M: KL 0.18-0.23 to the
trained model, against 1e-6 for this). Which layers were quantized is taken from the trained model, never guessed from
shapes: rounding the embedding too costs 0.1 nats.

Pieces of some rows stay in the cache from reading to writing, so a weight costs one way through memory, and the most
that is held of a model is one 16-bit weight, its 4-bit codes, and a few pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch

from .. import base_model
from ..base_model import prequantized
from ..kernels import nf4
from ..system.errors import InputError
from .reader import Reader
from .writer import Spec

# O out_features, I in_features, V vocab, N new tokens

_PIECE = {"cpu": 2**18, "cuda": 2**26}  # numbers in a piece: a MiB of float32, for a core's cache; 256 MiB on a GPU
# |cast error| / |delta| of the whole model above which storage costs what training brought; worth a warning.
CAST_LOSS_LIMIT = 0.25


@dataclass
class Plan:
    """What will be written, and where each tensor comes from.

    config: of the model that is written. specs: every parameter once (a tied head is not written), in the model's
    order. source: {name: tensor name in the files}. conv1d: names of modules that store (I, O). shapes: {module: (O,
    I)} of what may carry an update. copied: names in the files of tensors that go over as they are, because the architecture
    joins them into other parameters when it loads them (fused experts). kept: names in the files of tensors that are
    copied bit for bit: what is not text in a multimodal model. names: {name in specs: name in the written files}, where
    that is another.
    """

    config: object
    specs: list
    source: dict
    conv1d: set
    shapes: dict
    copied: set = field(default_factory=set)
    kept: set = field(default_factory=set)
    names: dict = field(default_factory=dict)

    @property
    def num_bytes(self):
        return sum(spec.num_bytes for spec in self.specs)

    @property
    def parameters(self):
        return {spec.name: spec.shape for spec in self.specs}

    @property
    def written(self):
        """Specs under the names that the written files have them by."""
        return [replace(spec, name=self.names.get(spec.name, spec.name)) for spec in self.specs]


def plan(checkpoint, config, dtype, trust_remote_code=False, adapter=None):
    """Return the Plan for writing the model of `checkpoint` with `adapter` (None: with any) in `dtype`, from headers alone.

    Raises:
        InputError: a parameter has no tensor in the files; new tokens where their rows cannot be trained; or an adapter
            that does not fit the model; or the files hold tensors of a dtype that is not read.
    """
    with Reader(checkpoint):
        pass
    config = type(config).from_dict(config.to_dict())  # the caller's stays as it is
    model = base_model.on_meta(config, trust_remote_code)
    if base_model.stored_quantization(config):
        base_model.refuse_other_codes(checkpoint, model)
        del config.quantization_config  # what is written is in full precision
        model = base_model.on_meta(config, trust_remote_code)
    if adapter is not None:
        adapter.refuse_unmergeable()
    if adapter is not None and _change(config, model, adapter):
        model = base_model.on_meta(config, trust_remote_code)
    ends, task = _ends(model), base_model.task_of(model)
    embedding, head = (*ends, None)[0], (None, *ends)[-1]  # None of a model that reads no tokens
    modules = base_model.token_modules(model) if checkpoint.new_tokens else []
    embeddings = {name: tuple(model.get_submodule(name).weight.shape) for name in modules}
    conv1d = {name for name in base_model.linear_names(model) if base_model.is_conv1d(model.get_submodule(name))}
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in (*base_model.linear_names(model), *ends)}
    shapes |= {name: shapes[name][::-1] for name in conv1d}
    result = Plan(config, [], {}, conv1d, shapes)
    replaced = adapter.replaced if adapter is not None else {}
    tied, missing, wrong, in_files = base_model.tied(model), [], [], checkpoint.shapes()
    stored = checkpoint.text_tensors
    for name, tensor in model.state_dict().items():
        if name in tied:
            if name in stored and tied[name] in stored:
                _refuse_unequal(checkpoint, stored[name], stored[tied[name]])
            continue
        found = checkpoint.in_files(name, model.base_model_prefix)
        if found is None and name == f"{head}.weight":  # untied by the adapter: it starts as the embedding
            found = checkpoint.in_files(f"{embedding}.weight", model.base_model_prefix)
        grows, expected = task.is_of_head(model, name) or name in replaced, tuple(tensor.shape)
        if found is None and not grows:
            missing.append(name)
            continue
        grows = grows or name.removesuffix(".weight") in embeddings
        has_codes = found is not None and prequantized.holds_codes(checkpoint, found)
        if found is not None and in_files[found] != expected and not (grows or has_codes):
            wrong.append(f"{name} is {in_files[found]} in the files, {expected} by config.json")
        result.source[name] = found
        result.specs.append(Spec(name, expected, dtype if tensor.is_floating_point() else tensor.dtype))
    if wrong:
        raise InputError.listing(f"{checkpoint.folder}: config.json and the weights do not match; the model", wrong)
    _copy_the_rest(checkpoint, result, missing, dtype, model)
    if checkpoint.half:
        _keep_the_other_half(checkpoint, result)
    if task.HAS_CLASSES:
        result.names = base_model.written_names(model)
    if adapter is not None:
        stays_tied = {name: result.parameters[tied[name]] for name in tied}
        adapter.refuse_mismatch(shapes, result.parameters | stays_tied, embeddings, checkpoint.new_tokens.values())
    return result


def _ends(model):
    """Return the names of the embedding and, where the model answers with words, of the head; [] of a model of images."""
    names = {module: name for name, module in model.named_modules()}
    return [names[end] for end in base_model.token_ends(model)]


def _change(config, model, adapter):
    """Make `config` that of the merged model, in place; return whether it differs from the base's.

    A vocabulary that was grown for the training is in the embedding that the adapter replaces. A head that is tied to
    the embedding can stay so only if both are the same after the merge.
    """
    text_config, changed = config.get_text_config(), False
    ends = _ends(model)
    if not ends:
        return False
    embedding, head = ends[0], ends[-1]
    replaced = {name: adapter.replaced.get(f"{name}.weight") for name in (embedding, head)}
    for tensor in replaced.values():
        if tensor is not None and tensor.dim() == 2 and len(tensor) != text_config.vocab_size:
            text_config.vocab_size, changed = len(tensor), True
    touched = [name for name in ends if name in adapter.updates or replaced[name] is not None]
    if not touched or f"{head}.weight" not in base_model.tied(model):
        return changed
    both = [tensor for tensor in replaced.values() if tensor is not None]
    same = len(both) == 2 and not adapter.updates.keys() & {embedding, head} and torch.equal(*both)
    if adapter.stays_tied:
        if not same and (replaced[embedding] is None or len(both) == 2 or adapter.updates.keys() & {embedding, head}):
            raise InputError(
                f"adapter {adapter.folder}: ensure_weight_tying with LoRA on {', '.join(touched)} cannot be merged; "
                "train the embedding through modules_to_save, or leave it out"
            )
        return changed
    if not same:
        config.tie_word_embeddings = text_config.tie_word_embeddings = False
        changed = True
    return changed


def _copy_the_rest(checkpoint, plan, missing, dtype, model):
    """Let tensors that no parameter is made of alone go over as they are, where the architecture joins them itself.

    A mixture model's files have a tensor an expert, and transformers makes one parameter of all of them. These are not
    quantized and carry no adapter, so the files' tensors are what is to be written.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    adapted = [name for name in missing if name.rpartition(".")[0] in plan.shapes]
    beside = prequantized.beside_codes(checkpoint)
    stored = checkpoint.text_tensors
    loose = {stored[name] for name in stored.keys() - base_model.tied(model).keys()}
    unused = sorted(loose - set(plan.source.values()) - beside)
    if missing and unused and not adapted and get_checkpoint_conversion_mapping(model.config.model_type):
        shapes = checkpoint.shapes()
        plan.copied = set(unused)
        plan.source |= {name: name for name in unused}
        plan.specs += [Spec(name, shapes[name], dtype) for name in unused]
        return
    if missing:
        raise InputError.listing(f"{checkpoint.folder}: export finds no tensor for parameters: it", missing)


def _keep_the_other_half(checkpoint, plan):
    """Let the plan write a multimodal checkpoint: text under the names that the files have, all else as it is."""
    half = checkpoint.half
    plan.names = {spec.name: half.name_in_files(spec.name) for spec in plan.specs if spec.name not in plan.copied}
    with Reader(checkpoint) as reader:
        plan.specs += [Spec(name, reader.shape(name), reader.dtype(name)) for name in half.kept]
    plan.source |= {name: name for name in half.kept}
    plan.kept = set(half.kept)


def _refuse_unequal(checkpoint, one, other):
    if not torch.equal(checkpoint.tensor(one), checkpoint.tensor(other)):
        raise InputError(
            f"{checkpoint.folder}: config.json ties {one} to {other}, but the files hold different weights"
        )


@dataclass(frozen=True)
class Base:
    """What the update is added to: how the trained model's base was quantized, and which of the two bases is meant.

    modules: {module: sha256 of its codes at training, or None}. quantization: the recipe's section, None for a base that
    was not quantized. original: add to the weights of the files instead.
    """

    modules: dict
    quantization: object
    original: bool = False

    @property
    def quantized(self):
        return {} if self.original or self.quantization is None else self.modules


class Merge:
    """Makes the tensors of a Plan one by one, in pieces, and measures what merging and casting did to them.

    modules: a record for each module that the adapter changed. underflows: {name: count} of numbers that became zero.
    digests: {module: whether its codes are those that were trained on}, for modules whose digest was recorded. reader:
    Reader of the base's files. each: how pieces are gone through, such as threads.Cores.map.
    """

    def __init__(self, reader, plan, adapter, base, device, each=map):
        self.reader, self.plan, self.adapter, self.base = reader, plan, adapter, base
        self.device, self.each = device, each
        self.specs = {spec.name: spec for spec in plan.specs}
        self._named = {written: name for name, written in plan.names.items()}
        largest = max((math.prod(self.specs[f"{name}.weight"].shape) for name in base.quantized), default=0)
        self._codes = torch.empty(largest // 2, dtype=torch.uint8)  # of one weight after the other
        self.modules, self.underflows, self.digests = [], {}, {}

    def pieces(self, name):
        """Yield the tensor that the plan writes as `name` as it is stored in the output, in order, some rows at a time.

        Raises:
            InputError: a number does not fit the output dtype; names the tensor and the remedy.
        """
        name = self._named.get(name, name)
        spec = self.specs[name]
        if name in self.plan.kept:
            yield self.reader.whole(name, self.each)
            return
        module, _, leaf = name.rpartition(".")
        carrier = module if leaf == "weight" else None  # what the adapter and the quantization call this tensor
        start, end = self._start(name, carrier)
        if not spec.dtype.is_floating_point:
            yield start
            return
        total = _Sums()
        if carrier in self.plan.conv1d:
            start, end = (tensor if tensor is None else tensor.T for tensor in (start, end))
            made = [*self._matrix(module, spec, spec.shape[::-1], start, end)]
            made = [(torch.cat([piece for piece, _ in made]).T, sum((sums for _, sums in made), _Sums()))]
        elif len(spec.shape) == 2:
            made = self._matrix(carrier, spec, spec.shape, start, end)
        else:
            made = self._vector(module, spec, start, end)
        for piece, sums in made:
            total += sums
            yield piece
        if total.is_changed:
            self.modules.append(total.record(module))
        if total.underflow:
            self.underflows[name] = total.underflow

    def _start(self, name, carrier):
        """Return (the base's own tensor, the one that the adapter puts in its place or None).

        The first is None where the files hold codes. A tensor of another shape than the base's, of a grown vocabulary,
        counts as the base. A matrix that is not quantized is read when its rows are asked for.
        """
        end, source = self.adapter.replaced.get(name), self.plan.source.get(name)
        if self._has_codes(name):
            return None, end
        if end is not None and self._grows(name):
            return end, None
        spec = self.specs[name]
        is_matrix = len(spec.shape) == 2 and spec.dtype.is_floating_point
        by_rows = is_matrix and carrier not in {*self.base.quantized, *self.plan.conv1d}
        return self.reader.rows(source) if by_rows else self.reader.whole(source, self.each), end

    def _has_codes(self, name):
        source = self.plan.source.get(name)
        return source is not None and prequantized.holds_codes(self.reader.checkpoint, source)

    def _grows(self, name):
        """True if the files have no tensor of this parameter's shape."""
        source = self.plan.source.get(name)
        return source is None or self.reader.shape(source) != self.specs[name].shape

    def _held(self, name, stored):
        """Return, in float32, what the base holds of numbers that are not quantized; the adapter's own stay as they are."""
        if self.base.original or (name in self.adapter.replaced and self._grows(name)):
            return stored.float()
        return stored.to(base_model.DTYPE_WHEN_QUANTIZED).float()

    def _vector(self, module, spec, start, end):
        """Yield (the tensor in its dtype, Sums) of a parameter that is not a matrix."""
        start = start.to(self.device)
        base = self._held(spec.name, start)
        merged = base if end is None else end.to(self.device).float()
        if spec.name.endswith(".bias"):
            if module in self.adapter.updates:
                merged = self.adapter.updates[module].merged_bias(merged)
            if module in self.adapter.bias_deltas:
                merged = merged + self.adapter.bias_deltas[module].to(self.device)
        yield _cast(spec, start, base, merged)

    def _matrix(self, module, spec, shape, start_OI, end_OI):
        """Yield (rows in their dtype, Sums) of a weight of `shape` (O, I), from top to bottom."""
        update = self.adapter.updates.get(module)
        codes = self._quantized(module, spec.name, start_OI)
        num_rows, width = shape
        at_once = max(1, _PIECE[self.device.type] // width)
        if codes is not None:
            whole_blocks = nf4.BLOCKSIZE // math.gcd(width, nf4.BLOCKSIZE)  # rows that begin and end at a block
            at_once = -(at_once // -whole_blocks) * whole_blocks

        def rows(first):
            last = min(first + at_once, num_rows)
            stored = None if start_OI is None else start_OI[first:last].to(self.device)
            base = self._held(spec.name, stored) if codes is None else codes.rows(first, last)
            merged = base if end_OI is None else end_OI[first:last].to(self.device).float()
            if module in self.adapter.rows:
                ids, rows_NI = self.adapter.rows[module]
                merged = _with_rows(merged, ids, rows_NI, first, last)
            return _cast(spec, stored, base, merged if update is None else update.merged(merged, slice(first, last)))

        yield from self.each(rows, range(0, num_rows, at_once))

    def _quantized(self, module, name, stored_OI):
        """Return the nf4.Quantized weight that training held, None if it was not quantized; compares its digest."""
        if stored_OI is None:
            source = self.plan.source[name]
            quantized = nf4.Quantized(*prequantized.read(self.reader.checkpoint, source, self.device))
        elif module in self.base.quantized:
            W_OI = stored_OI.to(self.device, base_model.DTYPE_WHEN_QUANTIZED).contiguous()
            how = self.base.quantization
            quantized = nf4.quantize(W_OI, how.quant_type, how.use_double_quant, self.each, self._codes)
        else:
            return None
        recorded = self.base.quantized.get(module)
        if recorded is not None:
            codes = base_model.as_recorded(quantized.codes, recorded)
            self.digests[module] = codes is not None
            quantized.codes = quantized.codes if codes is None else codes
        return quantized


def _with_rows(base, ids, rows_NI, first, last):
    """Return rows first to last: those of `base`, and those of `rows_NI` whose ids fall among them.

    Every row that the base does not have is one of `rows_NI`.
    """
    here = [index for index, token in enumerate(ids) if first <= token < last]
    if not here:
        return base
    result = torch.nn.functional.pad(base, (0, 0, 0, last - first - len(base)), value=math.nan)
    result[[ids[index] - first for index in here]] = rows_NI[here].to(result)
    return result


@dataclass
class _Sums:
    """What merging and casting did to some numbers: squared norms, and counts."""

    delta: float = 0.0
    quantization: float = 0.0
    cast: float = 0.0
    underflow: int = 0
    is_changed: bool = False

    def __add__(self, other):
        return _Sums(*(mine + theirs for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True)))

    def record(self, module):
        delta, cast = math.sqrt(self.delta), math.sqrt(self.cast)
        return {
            "name": module,
            "delta_norm": delta,
            "quantization_error": None if math.isnan(self.quantization) else math.sqrt(self.quantization),
            "cast_error": cast,
            "cast_loss": cast / delta if delta else None,
        }


def _cast(spec, stored, base, merged):
    """Return (`merged` in the dtype of the output, Sums); raises InputError where a number does not fit it.

    stored: what the files hold instead of `base`, None if that is not known.
    """
    dtype = spec.dtype
    cast = merged.to(dtype)
    low, high = torch.aminmax(merged)
    largest = max(-low.item(), high.item())
    if not math.isfinite(largest):
        raise InputError(f"{spec.name}: contains non-finite values; the base or the adapter is broken")
    # halfway from the largest number to the next power of two is where rounding goes to infinity
    if not largest < torch.finfo(dtype).max * (1 + torch.finfo(dtype).eps / 4):
        raise InputError(
            f"{spec.name}: largest number {largest:.3g} does not fit {str(dtype)[6:]}; "
            "export with --dtype bfloat16 or float32"
        )
    sums, exact = _Sums(), cast.float()
    if merged is not base:
        sums.is_changed = True
        before = torch.nn.functional.pad(base, (0, 0, 0, len(merged) - len(base))) if merged.dim() == 2 else base
        sums.delta = _square(merged - before)
        sums.cast = _square(exact - merged)
        sums.quantization = math.nan if stored is None else _square(base - stored.float())
    if dtype == torch.float16:
        sums.underflow = _zeros(exact) - _zeros(merged)
    return cast, sums


def _zeros(x):
    """Return how many numbers of `x` are 0: as a sum of floats, which on a CPU takes a third of the time of counting."""
    if x.device.type == "cpu" and x.numel() < 2**24:
        return int(torch.eq(x, 0, out=torch.empty_like(x)).sum())
    return x.numel() - int(torch.count_nonzero(x))


def _square(x):
    flat = x.reshape(-1)
    return torch.dot(flat, flat).item()
