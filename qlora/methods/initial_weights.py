"""Initial values of A and B other than a random A and B = 0 (`init_lora_weights`). None of them changes the base.

loftq           s B A is the best approximation of what quantization has lost, W - dequantize(NF4(W))
eva             A spans what the layer's inputs vary in most; ranks go to the layers where that explains most
orthogonal      A and B random, B A = 0
pissa, olora    s B A is the main part of W, and W is trained without that part: y = W x + s (B A - B0 A0) x
corda, lora_ga  the same with a B0 A0 that is made of training rows, calibrated.py; W may be quantized
"""

from __future__ import annotations

import copy

import torch

from .. import base_model
from ..data import IGNORE_INDEX
from ..recipe.methods import divisor
from ..system.errors import InputError
from . import calibrated
from .folder import PREFIX

_OF_WEIGHTS, _OF_ROWS = ("pissa", "olora"), ("corda", "lora_ga")
_SPLIT = (*_OF_WEIGHTS, *_OF_ROWS)
_DAMPING = 0.01  # of CorDA's C, a share of the mean of its diagonal, as in the authors' code
_GAMMA = 16  # of LoRA-GA, as in PEFT
_EVA_TOKENS = 16  # trained tokens a batch and principal component: fewer make the components those of the batch
_EVA_BATCHES, _EVA_PASSES = 64, 50


def settings(section, on_meta=False):
    """Return the arguments of peft.LoraConfig for ranks and initialization; on_meta: of the same shapes, without numbers."""
    from peft import EvaConfig

    chosen = section.init_lora_weights
    # [B, -B0] [A; A0] has rank 2 r; scaling stays what it is
    ranks = 2 if chosen in _SPLIT else 1
    alphas = divisor(ranks, section.use_rslora)
    return {
        "r": ranks * section.r,
        "lora_alpha": alphas * section.lora_alpha,
        "rank_pattern": {name: ranks * rank for name, rank in section.rank_pattern.items()},
        "alpha_pattern": {name: alphas * alpha for name, alpha in section.alpha_pattern.items()},
        "init_lora_weights": chosen if chosen in (True, "gaussian", "eva") and not on_meta else True,
        "eva_config": EvaConfig() if chosen == "eva" and not on_meta else None,
    }


def refuse(model, section):
    """Raise InputError if the initialization of `section` is impossible for the model."""
    chosen, quantized = section.init_lora_weights, base_model.quantized_modules(model)
    where = f"lora.init_lora_weights {chosen}"
    if chosen in _OF_WEIGHTS and quantized:
        raise InputError(
            f"{where}: needs a 16-bit base; use loftq, which starts from the quantization error, or set quantization: null"
        )
    if chosen == "loftq" and not quantized:
        raise InputError(f"{where}: the base is not quantized, so there is no quantization error; use pissa or olora")


def initialize(peft_model, section, checkpoint, examples):
    """Set A and B of a new PeftModel as `section` says; its config says from then on that nothing is to be initialised."""
    if section.init_lora_weights == "loftq":
        _correct_quantization(peft_model, checkpoint)
    elif section.init_lora_weights == "orthogonal":
        _make_orthogonal(peft_model)
    elif section.init_lora_weights == "eva":
        _span_the_inputs(peft_model, examples)
    elif section.init_lora_weights in _SPLIT:
        _split_off(peft_model, section.init_lora_weights, examples)
    config = peft_model.peft_config["default"]
    config.init_lora_weights, config.eva_config = True, None


def held(peft_model, section):
    """Return {name of an A or B: index of its numbers that training leaves as they are}: A0 and B0 of `_split_off`."""
    if section.init_lora_weights not in _SPLIT:
        return {}
    found: dict = {}
    for name, layer in _layers(peft_model):
        rest = slice(layer.r["default"] // 2, None)
        found[f"{PREFIX}{name}.lora_A.default.weight"] = (rest,)
        found[f"{PREFIX}{name}.lora_B.default.weight"] = (slice(None), rest)
    return found


def _layers(peft_model):
    """Yield (name in the base, LoRA layer) of the layers that have A and B."""
    from peft.tuners.lora import LoraLayer

    for name, module in peft_model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and "default" in module.lora_A:
            yield name, module


# ---- LoftQ -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _correct_quantization(peft_model, checkpoint):
    """Set s B A of each 4-bit layer to the best approximation of rank r of W - dequantize(NF4(W)), W from the files.

    This is the first of LoftQ's alternating steps; the later ones change the base. PEFT's replace_lora_weights_loftq
    leaves out s, and runs on CUDA alone.

    Source: Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for LLMs, 2023 (arXiv:2310.08659), algorithm 1, T = 1.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    prefix = peft_model.get_base_model().base_model_prefix
    for name, layer in _layers(peft_model):
        base = layer.get_base_layer()
        if not isinstance(base, Linear4bit):
            continue
        stored = checkpoint.in_files(f"{name}.weight", prefix)
        W_OI = checkpoint.tensor(stored).to(base.weight.device, torch.float32)
        exact = copy.copy(base.weight.quant_state)
        exact.dtype = torch.float32  # else it is rounded to bfloat16
        W_OI = W_OI.T if issubclass(base.source_cls, Conv1D) else W_OI
        A_RI, B_OR = low_rank(W_OI - dequantize_4bit(base.weight.data, exact), layer.r["default"])
        scale = layer.scaling["default"] ** -0.5
        layer.lora_A["default"].weight.copy_(A_RI * scale)
        layer.lora_B["default"].weight.copy_(B_OR * scale)


def low_rank(M_OI, rank):
    """Return A (R, I), B (O, R) with B A the best approximation of M, |A| = |B| column for row.

    From the eigenvectors of the smaller of M M' and M' M: exact to float32, many times faster than the SVD of a wide M.
    """
    if M_OI.shape[0] > M_OI.shape[1]:
        A_RO, B_IR = low_rank(M_OI.T, rank)
        return B_IR.T, A_RO.T
    U_OR = torch.linalg.eigh(M_OI @ M_OI.T).eigenvectors[:, -rank:]
    A_RI = U_OR.T @ M_OI
    roots_R = A_RI.norm(dim=1).clamp_min(torch.finfo(A_RI.dtype).tiny).sqrt()
    return A_RI / roots_R[:, None], U_OR * roots_R


# ---- orthogonal ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _make_orthogonal(peft_model):
    """Set A and B to random numbers with B A = 0; PEFT 0.21's own casts them to the uint8 of 4-bit codes.

    Source: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation
    """
    for _, layer in _layers(peft_model):
        rank, A, B = layer.r["default"], layer.lora_A["default"].weight, layer.lora_B["default"].weight
        Q, _ = torch.linalg.qr(torch.randn(rank, rank))
        A.copy_(Q[0::2].T @ torch.randn(rank // 2, layer.in_features) / 10)
        B.copy_(torch.randn(layer.out_features, rank // 2) @ Q[1::2] / 10)


# ---- EVA -------------------------------------------------------------------------------------------------------------


def _span_the_inputs(peft_model, examples):
    """Let PEFT's EVA read `examples` through the base, set each A, and share the ranks out anew among the layers.

    Source: Paischer et al., One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation, 2024
    (arXiv:2410.07170).

    Raises:
        InputError: too few trained tokens, or components that never settle.
    """
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    components = 2 * max(layer.r["default"] for _, layer in _layers(peft_model))
    batches, passes = _batches(examples, components), iter(range(_EVA_PASSES * _EVA_BATCHES))

    def forward(model, inputs):
        if next(passes, None) is None:
            raise InputError("lora.init_lora_weights eva: EVA did not converge; use more training rows")
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=1, use_cache=False)

    initialize_lora_eva_weights(peft_model, batches, forward_fn=forward, show_progress_bar=False)


def _batches(examples, components):
    """Return padded batches of the first examples, with enough trained tokens each."""
    batches, rows = [], []
    for example in examples:
        rows.append(example)
        if sum(row.num_trained for row in rows) >= _EVA_TOKENS * components:
            batches.append(_pad(rows))
            rows = []
        if len(batches) == _EVA_BATCHES:
            break
    if not batches:
        found = sum(row.num_trained for row in rows)
        if found < components:
            raise InputError(
                f"lora.init_lora_weights eva: {found} trained tokens are too few for lora.r; use more training rows"
            )
        batches.append(_pad(rows))
    return batches


def _pad(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([torch.tensor(row.input_ids) for row in rows], batch_first=True)
    labels = pad([torch.tensor(row.labels) for row in rows], batch_first=True, padding_value=IGNORE_INDEX)
    mask = pad([torch.ones(len(row.input_ids), dtype=torch.long) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# ---- PiSSA, OLoRA ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def _split_off(peft_model, kind, examples):
    """Set A = [A0; A0], B = [B0, -B0] with s B0 A0 a part of W, and train the first half of each.

    That is W - s B0 A0 + s B A, the model PiSSA and OLoRA train, with W left alone: PEFT subtracts s B0 A0 from W, where
    rounding to bfloat16 makes another base of it, and what is saved fits no other.

    Source: Meng et al., PiSSA: Principal Singular Values and Singular Vectors Adaptation of LLMs, 2024
    (arXiv:2404.02948); Bueyuekakyuez, OLoRA: Orthonormal Low-Rank Adaptation of LLMs, 2024 (arXiv:2406.01775).
    """
    for layer, A0, B0 in _parts(peft_model, kind, examples):
        layer.lora_A["default"].weight.copy_(torch.cat([A0, A0]))
        layer.lora_B["default"].weight.copy_(torch.cat([B0, -B0], dim=1))


def _parts(peft_model, kind, examples):
    """Yield (layer, A0 (R, I), B0 (O, R)), float32, of each LoRA layer."""
    layers = [layer for _, layer in _layers(peft_model)]
    if kind == "pissa":
        for layer in layers:
            yield layer, *_scaled(layer, *low_rank(_weight_of(layer), layer.r["default"] // 2))
    elif kind == "olora":
        for layer in layers:
            Q, R = torch.linalg.qr(_weight_of(layer))
            yield layer, R[: layer.r["default"] // 2], Q[:, : layer.r["default"] // 2]
    elif kind == "corda":
        for layer, C_II in calibrated.moments(
            peft_model, layers, calibrated.rows_of(kind, examples, peft_model.device)
        ):
            yield layer, *_scaled(layer, *_corda(layer, C_II))
    else:
        for layer, G_OI in calibrated.gradients(
            peft_model, layers, calibrated.rows_of(kind, examples, peft_model.device)
        ):
            yield layer, *_lora_ga(layer, G_OI)


def _scaled(layer, A_RI, B_OR):
    """Return the factors of a product that s B A is to be."""
    root = layer.scaling["default"] ** -0.5
    return A_RI * root, B_OR * root


def _corda(layer, C_II):
    """Return the factors of U S V' C^-1, U S V' the main components of W C: of W, what counts for inputs of moment C.

    This is the authors' "instruction-previewed" mode: rows of what is to be learned are looked at, not of what is to be kept.

    Source: Yang et al., CorDA: Context-Oriented Decomposition Adaptation, 2024 (arXiv:2406.05223).
    """
    C_II = C_II + _DAMPING * C_II.diagonal().mean() * torch.eye(len(C_II), device=C_II.device)
    A_RI, B_OR = low_rank(_weight_of(layer) @ C_II, layer.r["default"] // 2)
    return torch.linalg.solve(C_II, A_RI.T).T, B_OR


def _lora_ga(layer, G_OI):
    """Return A0 and B0 with which the first step of A and B is the nearest to that of W: A0 the first R right singular vectors of
    its gradient, B0 the next R left ones, of the size that keeps outputs stable.

    The paper's; PEFT 0.21 has B0 times the singular values of the gradient too, which makes it nearly nothing.

    Source: Wang et al., LoRA-GA: Low-Rank Adaptation with Gradient Approximation, 2024 (arXiv:2407.05000).
    """
    rank, normal = layer.r["default"] // 2, torch.nn.functional.normalize
    A, B = low_rank(G_OI, 2 * rank)  # from the smallest of these components to the largest
    size = len(G_OI) ** 0.25 / _GAMMA**0.5
    return normal(A[rank:], dim=1) * size, normal(B[:, :rank], dim=0) * size


def _weight_of(layer):
    """Return the weight (O, I) that a LoRA layer adapts, float32: of 4-bit codes what they stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    base = layer.get_base_layer()
    if isinstance(base, Linear4bit):
        return dequantize_4bit(base.weight.data, base.weight.quant_state).float()
    return base.weight.float().T if layer.fan_in_fan_out else base.weight.float()
