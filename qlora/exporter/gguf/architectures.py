"""The families that llama.cpp computes as transformers does; all else is refused by name.

What llama.cpp computes was read in the sources of llama-cpp-python 0.3.36 (src/models/*.cpp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...system.errors import InputError

REMEDY = (
    "set LLAMA_CPP to the folder of llama.cpp, whose own convert_hf_to_gguf.py is then used, or serve the exported folder "
    "with vLLM"
)


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a family: its name there, and what transformers has to agree with."""

    name: str
    activation: str = "silu"
    permuted: bool = False  # q and k rows in the order of rotation by neighbours
    norms_from_zero: bool = False  # the files hold weight - 1
    always_tied: bool = False
    conv1d: bool = False  # the files hold (in, out)
    biases: bool = False  # attention_bias and mlp_bias are known
    partial_rotary: bool = False


_LLAMA = Architecture("LLAMA", permuted=True, biases=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma": Architecture("GEMMA", "gelu_pytorch_tanh", norms_from_zero=True, always_tied=True),
    "gemma2": Architecture("GEMMA2", "gelu_pytorch_tanh", norms_from_zero=True, always_tied=True),
    "phi": Architecture("PHI2", "gelu_new", partial_rotary=True),
    "phi3": Architecture("PHI3", partial_rotary=True),
    "gpt2": Architecture("GPT2", activation="gelu_new", conv1d=True),
}


def architecture_of(folder, config):
    """Return the Architecture of `config`; raises InputError for what llama.cpp would compute otherwise."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"{folder}: the architecture {config.model_type} cannot be converted here (only {', '.join(ARCHITECTURES)}); "
            f"{REMEDY}"
        )
    problems = []

    def expect(name, *allowed):
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            problems.append(f"{name} is {value!r}, but llama.cpp always uses {allowed[0]!r}")

    expect("activation_function" if config.model_type == "gpt2" else "hidden_act", architecture.activation)
    if not architecture.biases:
        expect("attention_bias", False, None)
    if architecture.always_tied:
        expect("tie_word_embeddings", True)
    if not architecture.partial_rotary:
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(f"partial_rotary_factor is {rope['partial_rotary_factor']}, but llama.cpp always uses 1.0")
    if config.model_type == "gpt2":
        expect("scale_attn_weights", True)
        expect("scale_attn_by_inverse_layer_idx", False)
        expect("add_cross_attention", False)
    if config.model_type == "phi":
        expect("qk_layernorm", False)
        expect("tie_word_embeddings", False)
    if config.model_type == "phi3" and config.hidden_size != config.num_attention_heads * head_dim(config):
        problems.append("num_attention_heads * head_dim is not hidden_size")
    if config.model_type == "gemma2":
        expect("layer_types", [("sliding_attention", "full_attention")[i % 2] for i in range(config.num_hidden_layers)])
        scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 46 else config.head_dim
        expect("query_pre_attn_scalar", scale)
        if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
            problems.append("it has no softcapping, but llama.cpp always applies it")
    if problems:
        raise InputError.listing(f"{folder / 'config.json'}: as llama.cpp's {architecture.name}, it", problems, REMEDY)
    return architecture


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(folder, config, architecture):
    """Return what llama.cpp divides each rotary frequency by (float32), or None for nothing.

    Raises:
        InputError: a scaling that cannot be said in a GGUF file.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or architecture is not _LLAMA:
        raise InputError(
            f"{folder / 'config.json'}: rope_type {kind} of {config.model_type} cannot be converted here; {REMEDY}"
        )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, head_dim(config), 2, dtype=torch.int64).float() / head_dim(config)
    return (1.0 / rope["rope_theta"] ** exponents / scaled).float().numpy()
