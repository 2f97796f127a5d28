"""What makes a step fast: faster kernels for parts of the model, with the same results and fewer saved activations.

They are installed while the model trains. Each is first compared with the module that it replaces, on that module's own
weights. docs/benchmarks.md says what each gains.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from .. import base_model
from . import attention, liger, linear, loss, norm, swiglu

# a SwiGLU block before the layers in it, a library's kernel before ours: a module has the first that takes it
_KINDS = {"swiglu": swiglu, "liger": liger, "rmsnorm": norm, "lora": linear}
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-5}  # of the norm of output and gradient


@dataclass
class Installed:
    """modules: {kind: how many modules}. refused: {kind: names of classes whose output it did not reproduce}.

    failed: {kind: class and what was raised}, of a library that is installed and does not run.
    joined: rows of a batch are joined into one without padding; attention stays within each row. loss: kernels.loss is
    right for this model.
    """

    modules: dict = field(default_factory=dict)
    refused: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)
    joined: bool = False
    loss: bool = False


OFF = Installed()


def setting_of(recipe, config):
    """Return the setting of `installed` for a recipe and the config of its model."""
    if recipe.kernels == "auto" and attention.why_not(config, recipe.data.max_length):
        return "apart"
    return recipe.kernels


@contextlib.contextmanager
def installed(peft_model, setting="auto"):
    """Compute with kernels while the block runs; yields what is Installed.

    setting: "auto"; "apart" for the same without joining rows; "off" for none.
    """
    if setting == "off":
        yield OFF
        return
    model, patched = peft_model.get_base_model(), []
    by_torch = model.config._attn_implementation == "sdpa"  # else the recipe has asked for another one
    apart = loss.is_behind_virtual_tokens(peft_model)
    words = not base_model.task_of(model).HAS_CLASSES  # a class is that of one row, whatever its tokens
    joined = setting != "apart" and words and by_torch and not apart and attention.joins(model)
    found = Installed(joined=joined, loss=words and loss.takes(model))
    try:
        _install(peft_model, found, patched)
        yield found
    finally:
        for module in patched:
            vars(module).pop("forward", None)  # a module that two layers share is there twice


def _install(peft_model, found, patched):
    checked, within = {}, set()
    for kind, source in _KINDS.items():
        for module in peft_model.modules():
            forward = None if module in within else source.forward_of(module)
            if forward is None:
                continue
            key = (kind, _signature(module))
            if key not in checked:
                with base_model.gathered(peft_model, module):
                    checked[key] = _compared(kind, module, forward, found)
            if checked[key] is None:
                continue
            if not checked[key]:
                names = found.refused.setdefault(kind, [])
                names += [type(module).__name__] if type(module).__name__ not in names else []
                continue
            module.forward = forward
            patched.append(module)
            found.modules[kind] = found.modules.get(kind, 0) + 1
            within.update(module.modules())


def _compared(kind, module, forward, found):
    """Return whether a kernel `_reproduces` the module; None where a library raises instead, which is noted in `found`."""
    try:
        return _reproduces(module, forward)
    except getattr(_KINDS[kind], "FAILURES", ()) as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found.failed[kind] = f"{type(module).__name__}: {reason}"
        return None


def _signature(module):
    """Modules with the same classes, shapes and settings within are checked once."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    settings = tuple(
        (type(part), *((key, value) for key, value in vars(part).items() if isinstance(value, (bool, int, float))))
        for part in module.modules()
    )
    return settings, shapes


def _reproduces(module, forward):
    """Return whether `forward` gives the output and gradients of the module's own forward, on a few random tokens.

    In training mode, with the same random numbers for both, and with tokens large enough to meet a limit there may be.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    weight = parameters[0] if parameters else module.weight
    if weight.device.type == "meta":
        return True
    width = getattr(module, "in_features", None) or _width(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 8, width, generator=generator)
    x[:, 4:] *= 4 if weight.dtype == torch.float16 else 100  # 16 overflows in SmolLM2-135M
    x = x.to(weight.device, weight.dtype)
    was, devices = module.training, [weight.device] if weight.device.type == "cuda" else []
    module.train()
    results = []
    try:
        for run in (module.forward, forward):
            with torch.random.fork_rng(devices):
                torch.manual_seed(0)
                leaf = x.clone().requires_grad_()
                output = run(leaf)
            weights = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
            results.append([output, *torch.autograd.grad(output, [leaf, *parameters], weights)])
    finally:
        module.train(was)
    allowed = _TOLERANCE[weight.dtype]
    return all(
        bool((one.float() - other.float()).norm() <= allowed * one.float().norm().clamp(min=1e-12))
        for one, other in zip(*results, strict=True)
    )


def _width(module):
    return module.gate_proj.in_features if hasattr(module, "gate_proj") else module.weight.shape[-1]
