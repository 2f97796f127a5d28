"""What a model computes in: the dtype that the recipe names, or for `auto` one that the device has and the model can take.

The field is quantization.compute_dtype, and model.dtype where there is no quantization. `settle` puts the answer into the
recipe, which the run folder keeps; everything else reads it there.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

import torch

from ..system.events import note
from . import prequantized

# float16 ends at 65,504, and the activations of these pass that, whatever is trained. Gemma 3 reaches 800,000
# (huggingface/transformers#36822, unslothai/unsloth#4014); vLLM refuses float16 for all of these but Gemma 3n, which is
# built as Gemma 3 is (_FLOAT16_NOT_SUPPORTED_MODELS in vllm/config)
OVERFLOW = {
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3",
    "gemma3n_text": "Gemma 3n",
    "glm4": "GLM-4",
    "plamo2": "PLaMo 2",
}


@dataclass(frozen=True)
class Computer:
    """Where it is computed. name: in words; has_bfloat16: it computes in bfloat16 itself. is_gpu: without that it
    is fast in float16, which a processor is not."""

    name: str
    has_bfloat16: bool
    is_gpu: bool = True


def computer(device) -> Computer:
    """Return the Computer that a torch device is.

    By the card's capability: torch.cuda.is_bf16_supported() says yes of a T4, which only emulates bfloat16, in float32 and
    without its tensor cores (pytorch/pytorch#148322). By the processor's instructions: without those for bfloat16 a product
    in it takes several times as long as in float32 (docs/benchmarks.md).
    """
    if device.type == "cpu":
        return Computer("processor", _cpu_has_bfloat16(), is_gpu=False)
    if device.type != "cuda":
        return Computer(f"device {device}", True)
    old = torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
    return Computer(torch.cuda.get_device_name(device), not old)


def _cpu_has_bfloat16() -> bool:
    """Return whether the processor has instructions for products in bfloat16: AVX512-BF16 (as all with AMX have), or Arm's."""
    if platform.machine() in ("x86_64", "AMD64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def field(quantization):
    """Return the recipe's field that says the dtype."""
    return "model.dtype" if quantization is None else "quantization.compute_dtype"


def asked(section, quantization):
    """Return what the recipe says: "auto" or the name of a dtype. section: its `model`."""
    return section.dtype if quantization is None else quantization.compute_dtype


def choose(wanted, model_type, on: Computer):
    """Return (name of the dtype, why in words or ""); wanted: "auto" or a name; model_type: of a transformers text config."""
    family = OVERFLOW.get(model_type)
    if wanted == "float16" and family:
        return wanted, f"activations of {family} overflow float16; float32 is safe, and bfloat16 where a card has it"
    if wanted == "bfloat16" and not on.has_bfloat16:
        scores = ", and its attention takes memory for all scores" if on.is_gpu else ""
        return wanted, f"the {on.name} emulates bfloat16: slow{scores}; auto is faster"
    if wanted != "auto":
        return wanted, ""
    if on.has_bfloat16:
        return "bfloat16", ""
    if not on.is_gpu:
        return "float32", f"the {on.name} has no instructions for bfloat16, which would take several times as long"
    if family:
        return "float32", f"the {on.name} has no bfloat16, and activations of {family} overflow float16"
    return "float16", f"the {on.name} has no bfloat16"


def of_model(section, quantization):
    """Return the name of the dtype that a model is loaded to compute in; `auto`, where nothing has settled it, is bfloat16."""
    wanted = asked(section, quantization)
    return "bfloat16" if wanted == "auto" else wanted


def settled(section, quantization, config, on: Computer):
    """Return the recipe's `model` and `quantization` with the dtype that a model of this transformers config computes in on the
    Computer; a line says why, where it is not the usual one."""
    wanted = asked(section, quantization)
    dtype, why = choose(wanted, config.get_text_config().model_type, on)
    if why:
        note(f"dtype     computes in {dtype}: {why}")
    if dtype == wanted:
        return section, quantization
    if quantization is None:
        return section.model_copy(update={"dtype": dtype}), None
    return section, quantization.model_copy(update={"compute_dtype": dtype})


def settle(recipe, config, checkpoint, on: Computer):
    """Return `recipe` with what the checkpoint's files and the Computer decide: quantization, and the dtype.

    Raises:
        InputError: see prequantized.settle.
    """
    recipe = prequantized.settle(recipe, config, checkpoint)
    model, quantization = settled(recipe.model, recipe.quantization, config, on)
    return recipe.model_copy(update={"model": model, "quantization": quantization})
