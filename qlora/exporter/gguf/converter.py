"""An exported model folder -> one GGUF file, for llama.cpp and Ollama, and the proof that it says the same.

f16 and q8_0 are written here, tensor by tensor, for architectures and settings that llama.cpp computes as transformers
does; all else is refused by name. Where the user has llama.cpp's own converter, that is called instead. What llama.cpp
computes was read in the sources of llama-cpp-python 0.3.36 (src/models/*.cpp).
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from ... import base_model
from ...data import IGNORE_INDEX, chat
from ...recipe import Model
from ...system.errors import InputError, ProofFailed
from .. import proof
from . import vocabulary

KINDS = ("f16", "q8_0", "q4_k_m")

# llama.cpp's CPU code rounds activations to float16 before each product and reads GELU from a float16 table. Measured at
# f16 against float32 transformers: SmolLM2-135M 1.2e-6 nats a token; llama.cpp's own f16 against bf16 of Llama-3-8B: 2.5e-5.
# q8_0 and q4_k_m: SmolLM2-135M 0.004 and 0.041, Llama-3-8B 0.0014 and 0.031 (llama.cpp, tools/perplexity/README.md).
# The limits have room for other models and are far below what a mistake costs (tests/exporter/test_gguf.py).
KL_LIMIT = {"f16": 1e-4, "q8_0": 0.02, "q4_k_m": 0.3}
# f16: a greedy token may differ only where the transformers model's first two tokens are nearer than this, in nats.
NEAR_TIE = 0.05


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp computes a family: its name there, and what transformers has to agree with."""

    name: str
    activation: str = "silu"
    permuted: bool = False  # q and k rows in the order of rotation by neighbours
    norms_from_zero: bool = False  # the files hold weight - 1
    always_tied: bool = False
    conv1d: bool = False  # the files hold (in, out)
    biases: bool = False  # attention_bias and mlp_bias are known
    partial_rotary: bool = False


_LLAMA = _Architecture("LLAMA", permuted=True, biases=True)
_ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _Architecture("QWEN2"),
    "qwen3": _Architecture("QWEN3"),
    "gemma": _Architecture("GEMMA", "gelu_pytorch_tanh", norms_from_zero=True, always_tied=True),
    "gemma2": _Architecture("GEMMA2", "gelu_pytorch_tanh", norms_from_zero=True, always_tied=True),
    "phi": _Architecture("PHI2", "gelu_new", partial_rotary=True),
    "phi3": _Architecture("PHI3", partial_rotary=True),
    "gpt2": _Architecture("GPT2", activation="gelu_new", conv1d=True),
}


def refuse(folder, config, tokenizer, stops, kind):
    """Raise InputError where `write` would: an unknown kind, a missing tool, a model that cannot be converted right.

    folder: of the base, for what is said; config and tokenizer: of the model that will be exported.
    """
    if kind not in KINDS:
        raise InputError(f"--gguf {kind}: give one of {', '.join(KINDS)}")
    if kind == "q4_k_m":
        _quantizer()
    if _converter() is not None:
        return
    if importlib.util.find_spec("gguf") is None:
        raise InputError("--gguf needs the package gguf; run: pip install gguf llama-cpp-python")
    import gguf

    _rope_factors(folder, config, _architecture(folder, config))
    vocabulary.add(gguf.GGUFWriter(None, "llama"), tokenizer, config.vocab_size, sorted(stops))


def write(folder, out_file, kind, on_bytes=None):
    """Write the model in `folder` to `out_file` as GGUF of `kind` ("f16", "q8_0", "q4_k_m"); return its size in bytes.

    It is written as OUT_FILE.partial and renamed when whole. on_bytes(count): called with the bytes of each tensor
    written; never where another program does the writing.

    Raises:
        InputError: `out_file` exists; the model cannot be converted right; a tool or package is missing; a weight is
            beyond float16. Nothing is left at `out_file`.
    """
    folder, out_file = Path(folder), Path(out_file)
    if kind not in KINDS:
        raise InputError(f"--gguf {kind}: give one of {', '.join(KINDS)}")
    if out_file.exists():
        raise InputError(f"{out_file} already exists and is not overwritten; remove it or choose another name")
    if not out_file.parent.is_dir():
        raise InputError(f"{out_file}: there is no folder {out_file.parent}")
    quantize = _quantizer() if kind == "q4_k_m" else None
    first = "f16" if quantize else kind
    converter = _converter()
    if converter is None and importlib.util.find_spec("gguf") is None:
        raise InputError("--gguf needs the package gguf; run: pip install gguf llama-cpp-python")
    with _partial(out_file) as partial:
        converted = partial.with_name(f"{partial.name}.f16") if quantize else partial
        try:
            if converter is not None:
                _run([sys.executable, str(converter), str(folder), "--outtype", first, "--outfile", str(converted)])
            else:
                _convert(folder, converted, first, on_bytes)
            if quantize:
                quantize(converted, partial)
        finally:
            if quantize:
                converted.unlink(missing_ok=True)
    return out_file.stat().st_size


@contextlib.contextmanager
def _partial(out_file):
    """Yield OUT_FILE.partial to write; flush it to disk and rename it when the block ends well, remove it when not."""
    partial = out_file.with_name(f"{out_file.name}.partial")
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(partial, out_file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# --- llama.cpp's own tools -------------------------------------------------------------------------------------------


def _find_tool(name):
    """Return the path of llama.cpp's `name` in $LLAMA_CPP, $LLAMA_CPP/build/bin or on PATH, or None."""
    root = os.environ.get("LLAMA_CPP")
    if root:
        for place in (Path(root), Path(root) / "build" / "bin"):
            if (place / name).is_file():
                return place / name
    found = shutil.which(name)
    return Path(found) if found else None


def _converter():
    return _find_tool("convert_hf_to_gguf.py")


def _quantizer():
    """Return quantize(f16 file, out file) -> None; raises InputError if no quantizer is there."""
    program = _find_tool("llama-quantize")
    if program is not None:
        return lambda source, out: _run([str(program), str(source), str(out), "Q4_K_M"])
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError(
            "--gguf q4_k_m needs llama.cpp's quantizer: pip install llama-cpp-python, or put llama-quantize on the PATH, or "
            "set LLAMA_CPP to the folder that llama.cpp was built in"
        )
    return lambda source, out: _run([sys.executable, "-c", _QUANTIZE, str(source), str(out)])


# in a process of its own: it writes a line a tensor to stderr, and what aborts there does not take the export along
_QUANTIZE = """
import ctypes, os, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), ctypes.byref(params)))
"""


def adds_bos(gguf_file):
    """True if llama.cpp puts the start token before each prompt: the file says so, or says nothing where that is usual."""
    import gguf

    fields = gguf.GGUFReader(gguf_file).fields
    said, model, pre = (
        fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None
        for key in ("add_bos_token", "model", "pre")
    )
    return bool(said) if said is not None else model == "llama" or pre in ("llama-bpe", "llama3", "llama-v3", "tekken")


def _run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        last = "\n  ".join(done.stdout.strip().splitlines()[-5:])
        raise InputError(f"{Path(command[0]).name} {Path(command[1]).name} failed:\n  {last}")


# --- the conversion --------------------------------------------------------------------------------------------------


def _convert(folder, out, kind, on_bytes):
    import gguf

    section = Model(name_or_path=str(folder))
    checkpoint = base_model.find(section)
    config = base_model.load_config(checkpoint, section)
    tokenizer = base_model.load_tokenizer(folder, section)
    architecture = _architecture(folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], config.num_hidden_layers)
    factors = _rope_factors(folder, config, architecture)
    stops = sorted(chat.stop_token_ids(tokenizer, checkpoint.generation_config()))

    plan = []
    for name, shape in _shapes(checkpoint, config).items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise InputError(f"{folder}: llama.cpp has no counterpart for the tensor {name}")
        shape = shape[::-1] if _is_conv1d(name, architecture) else shape
        plan.append((name, new_name, shape, _stored_as(new_name, shape, kind)))
    _refuse_full_disk(out, sum(_num_bytes(shape, dtype) for _, _, shape, dtype in plan))

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    try:
        name = vocabulary.add(writer, tokenizer, config.vocab_size, stops)
        if name is not None:
            writer.add_name(name)
        _add_shape(writer, config, architecture)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        if kind != "f16":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for _, new_name, shape, dtype in plan:
            stored = gguf.quant_shape_to_byte_shape(shape, dtype) if dtype == gguf.GGMLQuantizationType.Q8_0 else shape
            writer.add_tensor_info(
                new_name, stored, _numpy_dtype(dtype), _num_bytes(shape, dtype), dtype if stored != shape else None
            )
        writer.open_output_file(out)
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for source, _, shape, dtype in plan:
            with safe_open(checkpoint.folder / checkpoint.files[source], "pt") as file:
                tensor = file.get_tensor(source)
            writer.write_tensor_data(_stored(source, _as_llama_cpp(source, tensor, config, architecture), dtype))
            if on_bytes is not None:
                on_bytes(_num_bytes(shape, dtype))
    finally:
        writer.close()


def _architecture(folder, config):
    """Return the _Architecture of `config`; raises InputError for what llama.cpp would compute otherwise."""
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise InputError(
            f"{folder}: the architecture {config.model_type} cannot be converted here (only {', '.join(_ARCHITECTURES)}); "
            f"{_REMEDY}"
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
    if config.model_type == "phi3" and config.hidden_size != config.num_attention_heads * _head_dim(config):
        problems.append("num_attention_heads * head_dim is not hidden_size")
    if config.model_type == "gemma2":
        expect("layer_types", [("sliding_attention", "full_attention")[i % 2] for i in range(config.num_hidden_layers)])
        scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 46 else config.head_dim
        expect("query_pre_attn_scalar", scale)
        if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
            problems.append("it has no softcapping, but llama.cpp always applies it")
    if problems:
        raise InputError.listing(f"{folder / 'config.json'}: as llama.cpp's {architecture.name}, it", problems, _REMEDY)
    return architecture


_REMEDY = (
    "set LLAMA_CPP to the folder of llama.cpp, whose own convert_hf_to_gguf.py is then used, or serve the exported folder "
    "with vLLM"
)


def _shapes(checkpoint, config):
    """Return {name: shape} of the model's parameters, a tied head left out; raises InputError if the files differ."""
    model = base_model.on_meta(config)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    expected = {name: tuple(one.shape) for name, one in model.state_dict().items() if name not in tied}
    found = {name: shape for name, shape in checkpoint.shapes().items() if name not in tied}
    if found != expected:
        wrong = sorted({name for name, _ in found.items() ^ expected.items()})
        raise InputError.listing(f"{checkpoint.folder}: config.json and the weights do not match; the model", wrong)
    return expected


def _head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_shape(writer, config, architecture):
    """Add what llama.cpp reads of config.json."""
    context = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type != "gemma2":
        context = min(context, window)  # llama.cpp attends to everything here, which is the same up to the window
    writer.add_context_length(context)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type == "phi":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * _head_dim(config)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _rope_factors(folder, config, architecture):
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
            f"{folder / 'config.json'}: rope_type {kind} of {config.model_type} cannot be converted here; {_REMEDY}"
        )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, _head_dim(config), 2, dtype=torch.int64).float() / _head_dim(config)
    return (1.0 / rope["rope_theta"] ** exponents / scaled).float().numpy()


def _is_conv1d(name, architecture):
    return architecture.conv1d and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _as_llama_cpp(name, tensor, config, architecture):
    """Return the tensor `name` as llama.cpp wants it: its row order, its orientation, its zero."""
    if _is_conv1d(name, architecture):
        return tensor.T
    if architecture.norms_from_zero and name.endswith("norm.weight"):
        return tensor.float() + 1
    if architecture.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
        return permuted(tensor, config.num_attention_heads)
    if architecture.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
        return permuted(tensor, config.num_key_value_heads)
    return tensor


def permuted(tensor, num_heads):
    """Return the rows of each head interleaved: transformers rotates row i with row i + half, llama.cpp neighbours."""
    halves = tensor.reshape(num_heads, 2, tensor.shape[0] // num_heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _stored_as(new_name, shape, kind):
    """Return the GGML type: llama.cpp wants what is one-dimensional, and positions, in float32; q8_0 has blocks of 32."""
    import gguf

    if len(shape) == 1 or new_name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and shape[-1] % 32 == 0:
        return gguf.GGMLQuantizationType.Q8_0
    return gguf.GGMLQuantizationType.F16


def _stored(name, tensor, dtype):
    """Return the bytes of `tensor` as GGML type `dtype`, made a few rows at a time: float32 of all would be twice the file."""
    import gguf
    import numpy as np

    limit = 65504 if dtype == gguf.GGMLQuantizationType.F16 else torch.finfo(torch.float32).max
    result, step = None, max(1, 2**22 // tensor[0].numel())
    for start in range(0, len(tensor), step):
        rows = tensor[start : start + step].float().contiguous()
        largest = rows.abs().max().item()
        if not largest <= limit:
            raise InputError(f"{name} contains {largest:.3g}, which overflows {dtype.name.lower()}; choose --gguf q8_0")
        part = gguf.quants.quantize(rows.numpy(), dtype)
        if result is None:
            result = np.empty((len(tensor), *part.shape[1:]), part.dtype)
        result[start : start + step] = part
    return result


def _numpy_dtype(dtype):
    import numpy as np

    return {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "Q8_0": np.dtype(np.uint8)}[dtype.name]


def _num_bytes(shape, dtype):
    import math

    import gguf

    block, size = gguf.GGML_QUANT_SIZES[dtype]
    return math.prod(shape) // block * size


def _refuse_full_disk(out, num_bytes):
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes * 1.01:
        raise InputError(f"{out.parent}: the file takes {num_bytes:,} bytes, {free:,} are free on that disk")


# --- the proof -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proof:
    """What was compared. proven: False with why_not where llama-cpp-python is not installed, and nothing was.

    num_tokens: greedy tokens of the transformers model; same_top1: the share that llama.cpp would say too, after the
    same words; kl: KL(transformers, llama.cpp) in nats a token; widest_miss: the greatest lead in nats that a token had
    in transformers which llama.cpp did not choose.
    """

    proven: bool
    why_not: str | None = None
    num_prompts: int = 0
    num_tokens: int = 0
    same_top1: float = 0.0
    kl: float = 0.0
    widest_miss: float = 0.0


def prompts_of(tokenizer, rows, limit=8):
    """Return up to `limit` prompts, as strings, of Examples: what stands before the first trained token, shortest first;
    of a row that is trained whole, its first half."""
    starts = []
    for row in rows:
        first = next(at for at, label in enumerate(row.labels) if label != IGNORE_INDEX)
        starts.append(row.input_ids[: first if first > 1 else max(1, len(row.input_ids) // 2)])
    shortest = sorted(starts, key=len)[:limit]
    return [tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in shortest]


def prove(folder, gguf_file, kind, prompts, max_new_tokens=32):
    """Return the Proof that llama.cpp reads in `gguf_file` what transformers reads in `folder`.

    prompts: strings as the chat template renders them. llama.cpp has to make the same tokens of each, with the start
    token put before by itself if the file says so. Then transformers answers greedily (in float32 where that fits, see
    `proof.reload`), and llama.cpp is shown prompt and answer: after every token of it, the two distributions are compared.
    KL at most KL_LIMIT; f16 also: equal greedy tokens, but for near ties. Memory, beside the two models: 4 bytes for each
    token of the longest prompt and each of the vocabulary.

    Raises:
        ProofFailed: other tokens, or other probabilities; says which.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return Proof(
            False, "not proven: llama-cpp-python is not installed; run pip install llama-cpp-python and export again"
        )
    from llama_cpp import Llama

    section = Model(name_or_path=str(folder))
    tokenizer = base_model.load_tokenizer(Path(folder), section)
    rows = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    longest = max(map(len, rows)) + max_new_tokens
    model = proof.reload(Path(folder), base_model.default_device())
    # float32 keys and values: llama.cpp's default is float16, which would be compared too
    with contextlib.closing(
        Llama(str(gguf_file), n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True, type_k=0, type_v=0,
              yarn_attn_factor=-1.0, verbose=False, n_threads=torch.get_num_threads())
    ) as served:  # fmt: skip
        for prompt, row in zip(prompts, rows, strict=True):
            _refuse_other_tokens(tokenizer, served, prompt, row)
        found = [_compare(model, served, row, max_new_tokens) for row in rows]
    kl, lead, same = (torch.cat(parts) for parts in zip(*found, strict=True))
    missed = lead[~same]
    result = Proof(
        True,
        num_prompts=len(rows),
        num_tokens=len(kl),
        same_top1=same.float().mean().item(),
        kl=kl.mean().item(),
        widest_miss=missed.max().item() if len(missed) else 0.0,
    )
    problems = []
    if not result.kl <= KL_LIMIT[kind]:
        problems.append(
            f"KL to the exported folder is {result.kl:.2e} nats per token; the limit for {kind} is {KL_LIMIT[kind]}"
        )
    if kind == "f16" and result.widest_miss > NEAR_TIE:
        problems.append(
            f"it predicts another token where the exported folder leads by {result.widest_miss:.2f} nats; the limit is {NEAR_TIE}"
        )
    if problems:
        raise ProofFailed("\n  ".join([f"{gguf_file} is not the exported model:", *problems]))
    return result


def _refuse_other_tokens(tokenizer, served, prompt, row):
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(served.model)
    adds = bool(llama_cpp.llama_vocab_get_add_bos(vocab))
    text = prompt.removeprefix(tokenizer.bos_token) if adds else prompt
    found = served.tokenize(text.encode(), add_bos=True, special=True)
    if found != row:
        at = next(
            (i for i, pair in enumerate(zip(found, row, strict=False)) if pair[0] != pair[1]), min(len(found), len(row))
        )
        raise ProofFailed(
            f"llama.cpp tokenizes a prompt differently: from token {at} on {found[at : at + 5]} instead of {row[at : at + 5]} "
            f"({tokenizer.decode(row[at : at + 5])!r}) in {prompt[:80]!r}"
        )


@torch.no_grad()
def _compare(model, served, row, max_new_tokens):
    """Return (KL in nats, lead of the first token over the second in nats, same first token?) for each greedy token."""
    ids, rows, cache = list(row), [], None
    while len(rows) < max_new_tokens:
        new = torch.tensor([ids if cache is None else ids[-1:]], device=model.device)
        output = model(new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1].float().cpu())
        ids.append(rows[-1].argmax().item())
    served.reset()
    served.eval(ids[:-1])
    expected = torch.stack(rows).log_softmax(-1)
    found = torch.from_numpy(served.scores[len(row) - 1 : len(ids) - 1].copy()).log_softmax(-1)
    top = expected.topk(2).values
    kl = (expected.exp() * (expected - found)).sum(-1)
    return kl, top[:, 0] - top[:, 1], expected.argmax(-1) == found.argmax(-1)
