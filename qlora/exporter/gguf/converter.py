"""An exported model folder -> one GGUF file, for llama.cpp and Ollama.

f16 and q8_0 are written here, tensor by tensor, for architectures and settings that llama.cpp computes as transformers
does; all else is refused by name. Where the user has llama.cpp's own converter, that is called instead.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from ... import base_model
from ...data import chat
from ...recipe import Model
from ...system.errors import InputError
from ...system.extras import how_to_install
from ...system.storage import free_disk_bytes, fsync
from . import llama_cpp_tools, tensors, vocabulary
from .architectures import architecture_of, head_dim, rope_factors

KINDS = ("f16", "q8_0", "q4_k_m")


def refuse(folder, config, tokenizer, stops, kind):
    """Raise InputError where `write` would: an unknown kind, a missing tool, a model that cannot be converted right.

    folder: of the base, for what is said; config and tokenizer: of the model that will be exported.
    """
    if kind not in KINDS:
        raise InputError(f"--gguf {kind}: give one of {', '.join(KINDS)}, or adapter")
    if kind == "q4_k_m":
        llama_cpp_tools.quantizer()
    refuse_without_gguf()
    if llama_cpp_tools.converter() is not None:
        return
    import gguf

    rope_factors(folder, config, architecture_of(folder, config))
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
    refuse_taken(out_file)
    quantize = llama_cpp_tools.quantizer() if kind == "q4_k_m" else None
    first = "f16" if quantize else kind
    converter = llama_cpp_tools.converter()
    refuse_without_gguf()
    with partial(out_file) as unfinished:
        converted = unfinished.with_name(f"{unfinished.name}.f16") if quantize else unfinished
        try:
            if converter is not None:
                command = [sys.executable, str(converter), str(folder), "--outtype", first, "--outfile", str(converted)]
                llama_cpp_tools.run(command)
                _refuse_other_output(converted, converter)
            else:
                _convert(folder, converted, first, on_bytes)
            if quantize:
                quantize(converted, unfinished)
        finally:
            if quantize:
                converted.unlink(missing_ok=True)
    return out_file.stat().st_size


def refuse_taken(out_file):
    """Raise InputError if no new file can be written at `out_file`."""
    if out_file.exists():
        raise InputError(f"{out_file} already exists and is not overwritten; remove it or choose another name")
    if not out_file.parent.is_dir():
        raise InputError(f"{out_file}: there is no folder {out_file.parent}")


def refuse_without_gguf():
    """Raise InputError unless the package gguf is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"--gguf needs the package gguf; install it:  {how_to_install('gguf')}")


def _refuse_other_output(file, program):
    """Raise InputError unless `program`, which has ended well, has left a GGUF file there."""
    if not file.is_file():
        raise InputError(f"{program} ended without an error, but wrote no file; is it llama.cpp's own?")
    with open(file, "rb") as opened:
        first = opened.read(4)
    if first != b"GGUF":
        raise InputError(f"{program} wrote a file that begins with {first!r}, not with GGUF; is it llama.cpp's own?")


@contextlib.contextmanager
def partial(out_file):
    """Yield OUT_FILE.partial to write; flush it to disk and rename it when the block ends well, remove it when not."""
    file = out_file.with_name(f"{out_file.name}.partial")
    try:
        yield file
        fsync(file)
        os.rename(file, out_file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def adds_bos(gguf_file):
    """True if llama.cpp puts the start token before each prompt: the file says so, or says nothing where that is usual."""
    import gguf

    fields = gguf.GGUFReader(gguf_file).fields
    said, model, pre = (
        fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None
        for key in ("add_bos_token", "model", "pre")
    )
    return bool(said) if said is not None else model == "llama" or pre in ("llama-bpe", "llama3", "llama-v3", "tekken")


def _convert(folder, out, kind, on_bytes):
    import gguf

    section = Model(name_or_path=str(folder))
    checkpoint = base_model.find(section)
    config = base_model.load_config(checkpoint, section)
    tokenizer = base_model.load_tokenizer(folder, section)
    architecture = architecture_of(folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], config.num_hidden_layers)
    factors = rope_factors(folder, config, architecture)
    stops = sorted(chat.stop_token_ids(tokenizer, checkpoint.generation_config()))

    plan = []
    for name, shape in _shapes(checkpoint, config).items():
        new_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new_name is None:
            raise InputError(f"{folder}: llama.cpp has no counterpart for the tensor {name}")
        shape = shape[::-1] if tensors.is_conv1d(name, architecture) else shape
        plan.append((name, new_name, shape, tensors.stored_as(new_name, shape, kind)))
    _refuse_full_disk(out, sum(tensors.num_bytes(shape, dtype) for _, _, shape, dtype in plan))

    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    try:
        name = vocabulary.add(writer, tokenizer, config.vocab_size, stops)
        if name is not None:
            writer.add_name(name)
        _add_shape(writer, config)
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"])
        if kind != "f16":
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for _, new_name, shape, dtype in plan:
            stored = gguf.quant_shape_to_byte_shape(shape, dtype) if dtype == gguf.GGMLQuantizationType.Q8_0 else shape
            writer.add_tensor_info(
                new_name,
                stored,
                tensors.numpy_dtype(dtype),
                tensors.num_bytes(shape, dtype),
                dtype if stored != shape else None,
            )
        writer.open_output_file(out)
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for source, _, shape, dtype in plan:
            tensor = tensors.as_llama_cpp(source, checkpoint.tensor(source), config, architecture)
            writer.write_tensor_data(tensors.stored(source, tensor, dtype))
            if on_bytes is not None:
                on_bytes(tensors.num_bytes(shape, dtype))
    finally:
        writer.close()


def _shapes(checkpoint, config):
    """Return {name: shape} of the model's parameters, a tied head left out; raises InputError if the files differ."""
    model = base_model.on_meta(config)
    tied = base_model.tied(model)
    expected = {name: tuple(one.shape) for name, one in model.state_dict().items() if name not in tied}
    found = {name: shape for name, shape in checkpoint.shapes().items() if name not in tied}
    if found != expected:
        wrong = sorted({name for name, _ in found.items() ^ expected.items()})
        raise InputError.listing(f"{checkpoint.folder}: config.json and the weights do not match; the model", wrong)
    return expected


def _add_shape(writer, config):
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
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    rope = config.rope_parameters
    writer.add_rope_dimension_count(int(rope.get("partial_rotary_factor", 1.0) * head_dim(config)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        import gguf

        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _refuse_full_disk(out, num_bytes):
    free = free_disk_bytes(out)
    if free < num_bytes * 1.01:
        raise InputError(f"{out.parent}: the file takes {num_bytes:,} bytes, {free:,} are free on that disk")
