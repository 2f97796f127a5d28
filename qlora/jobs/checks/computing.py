"""What a step consists of, computed at a tiny size on the device that would be used."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

_OUT, _IN, _RANK = 128, 256, 4
_DEVIATION = 2e-2  # of the norm: bfloat16 rounding is up to 0.5 % here, a code that is wrong over 10 %


def _device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def nf4_step():
    """Quantize a layer to NF4 on the CPU and on the device: equal codes. Train a low-rank update of it: a forward and a backward
    pass as with the dequantized weight in float32."""
    import torch

    codes, deviations, loss, gradients = _step(torch.device("cpu"))
    found = f"loss {loss:.4f} on the CPU"
    if _device().type == "cuda":
        on_device = _step(_device())
        if not torch.equal(codes, on_device[0]):
            differ = (codes != on_device[0]).float().mean().item()
            return (
                False,
                f"{differ:.1%} of the codes differ between CPU and GPU",
                "reinstall bitsandbytes: see versions",
            )
        _, deviations, loss, gradients = on_device
        found = f"equal codes on CPU and GPU; loss {loss:.4f} on the GPU"
    finite = all(torch.isfinite(gradient).all() for gradient in gradients) and loss == loss
    ok = finite and max(deviations) < _DEVIATION and all(gradient.abs().sum() > 0 for gradient in gradients)
    found += "" if finite else ", not finite"
    found += ", forward {:.1%} and backward {:.1%} off the dequantized weight".format(*deviations)
    return ok, found, None if ok else "python -m pip install --force-reinstall --no-deps bitsandbytes"


def _step(device):
    """Return (codes on the CPU, shares by which output and gradient of the input are off, loss, gradients of A and B)."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).bfloat16()  # noqa: E731
    layer = Linear4bit(_IN, _OUT, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False  # see base_model/loading.py
    layer.weight.data = draw(_OUT, _IN) * 0.05
    layer = layer.to(device)
    A_RI, B_OR = ((draw(*shape) * 0.05).to(device).requires_grad_() for shape in ((_RANK, _IN), (_OUT, _RANK)))
    x_TI, target_TO = draw(32, _IN).to(device).requires_grad_(), draw(32, _OUT).to(device)
    output_TO = layer(x_TI)
    loss = (output_TO + x_TI @ A_RI.T @ B_OR.T - target_TO).float().square().mean()
    loss.backward()

    weight_OI = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    exact_TI = x_TI.detach().float().requires_grad_()
    expected_TO = exact_TI @ weight_OI.T
    update_OI = B_OR.detach().float() @ A_RI.detach().float()
    (expected_TO + exact_TI @ update_OI.T - target_TO.float()).square().mean().backward()
    deviations = _off(output_TO, expected_TO), _off(x_TI.grad, exact_TI.grad)
    return layer.weight.data.flatten().cpu(), deviations, loss.item(), (A_RI.grad, B_OR.grad)


def _off(found, expected):
    """Return the norm of the difference over that of `expected`."""
    return ((found.detach().float() - expected.detach().float()).norm() / expected.detach().float().norm()).item()


def optimizer_step():
    """A step of the default optimizer, whose state is in 8 bit and, on a GPU, paged."""
    import torch
    from bitsandbytes.optim import PagedAdamW8bit

    device = _device()
    parameter = torch.nn.Parameter(torch.ones(2**18, device=device))  # states are paged from 100,000 numbers on
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer = PagedAdamW8bit([parameter], lr=0.1, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a CPU nothing is paged, and it says so
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    state = optimizer.state[parameter]["state1"]
    off = (parameter.detach() - 0.9).abs().max().item()  # the first step of Adam is lr, against the gradient's sign
    paged = getattr(state, "is_paged", False)
    ok = off < 1e-2 and state.dtype == torch.uint8 and (paged or device.type == "cpu")
    found = f"8-bit AdamW, {'paged' if paged else 'not paged, as on a CPU' if device.type == 'cpu' else 'NOT paged'}"
    found += "" if off < 1e-2 else f", a step that is {off:.2g} off"
    return ok, found, None if ok else "set training.optim=adamw_torch; reinstall bitsandbytes: see versions"


def attention():
    """Attention within the documents of a packed row, and by which way it is computed here."""
    import torch

    from ...kernels import attention as kernel

    device, lengths = _device(), [37, 91]
    dtype = torch.bfloat16
    query, key, value = torch.randn(3, 1, 4, sum(lengths), 64, generator=torch.Generator().manual_seed(0)).to(
        device, dtype
    )
    module = SimpleNamespace(num_key_value_groups=1)
    found, _ = kernel.segment_attention(module, query, key, value, None, lengths)
    expected = kernel.one_by_one(module, query, key, value, lengths)
    deviation = _off(found, expected)
    if device.type == "cpu":
        how = "in blocks"
    elif kernel.takes_one_call(module, query, value, kernel._capability(query.device)):
        how = "all documents in one call (varlen_attn)"
    else:
        how = "document by document: this card or torch has no varlen_attn"
    return (
        deviation < _DEVIATION,
        f"{how}; {deviation:.1%} off torch's own",
        None if deviation < _DEVIATION else "kernels=off",
    )
