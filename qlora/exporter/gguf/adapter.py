"""A LoRA adapter -> one GGUF file of its own, which llama.cpp adds to its base with --lora.

Each update is two tensors under the name of the base's, NAME.lora_a (R, I) and NAME.lora_b (O, R), rows of B in llama.cpp's
order. llama.cpp computes W x + alpha / R * B A x, with one alpha for the file (llama-adapter.cpp): where a layer has another
scaling, B carries the rest.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ... import base_model
from ...system.errors import InputError, ProofFailed
from . import tensors
from .architectures import ARCHITECTURES, architecture_of
from .converter import partial, refuse_without_gguf

KIND = "adapter"
A, B = ".lora_a", ".lora_b"

# O out_features, I in_features, R rank


def refuse(adapter, folder, config, remedy):
    """Raise InputError where `write` would write something else than what was trained. folder: of the base; remedy: what else
    can be done, in words."""
    refuse_without_gguf()
    more = {
        "new tokens": adapter.rows,
        "weights trained whole (modules_to_save, biases)": adapter.replaced or adapter.bias_deltas,
    }
    found = [name for name, there in more.items() if there]
    if adapter.kind != "LoRA":
        raise InputError(
            f"adapter {adapter.folder}: is {adapter.kind}, and llama.cpp's --lora takes only LoRA; {remedy}"
        )
    if found:
        raise InputError(
            f"adapter {adapter.folder}: has {', '.join(found)}, and llama.cpp's --lora takes only LoRA; {remedy}"
        )
    if config.model_type not in ARCHITECTURES:
        raise InputError(
            f"{folder}: adapters of the architecture {config.model_type} cannot be converted here (only "
            f"{', '.join(ARCHITECTURES)}); use llama.cpp's own convert_lora_to_gguf.py on {adapter.folder}, or {remedy}"
        )
    model = base_model.on_meta(config)
    tied, embedding = base_model.tied(model), model.get_input_embeddings()
    wrong = [name for name in adapter.updates if model.get_submodule(name) is embedding or f"{name}.weight" in tied]
    if wrong:
        raise InputError(
            f"adapter {adapter.folder}: trains {', '.join(wrong)}, an embedding or a head that is tied to it, which llama.cpp's "
            f"--lora does not take; {remedy}"
        )


def write(adapter, folder, config, out_file, name) -> dict:
    """Write the LoRA `adapter` of the base in `folder` to `out_file`, in float32; return {"file", "bytes", "alpha", "modules"}.

    name: it is called in the file. What was written is read back and compared before it gets its name.

    Raises:
        InputError: llama.cpp has no counterpart for a layer.
        ProofFailed: the file does not hold the update that was trained.
    """
    import gguf

    out_file = Path(out_file)
    architecture = architecture_of(folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], config.num_hidden_layers)
    alpha = next(_alpha_of(one) for one in adapter.updates.values())
    pairs: dict = {}
    for module, update in adapter.updates.items():
        stored = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if stored is None:
            raise InputError(f"{folder}: llama.cpp has no counterpart for the layer {module}")
        B_OR = update.B_OR.float() * (_alpha_of(update) / alpha)
        pairs[stored] = (update.A_RI.float(), _in_order(module, B_OR, config, architecture))
    with partial(out_file) as unfinished:
        writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_name(name)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32)
            for stored, (A_RI, B_OR) in pairs.items():
                writer.add_tensor(stored + A, A_RI.contiguous().numpy())
                writer.add_tensor(stored + B, B_OR.contiguous().numpy())
            writer.open_output_file(unfinished)
            writer.write_header_to_file(unfinished)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        _refuse_other_updates(unfinished, adapter, names, config, architecture)
    return {"file": str(out_file), "bytes": out_file.stat().st_size, "alpha": alpha, "modules": len(pairs)}


def _alpha_of(update):
    """Return the alpha with which llama.cpp has this update's scaling."""
    return update.scaling * len(update.A_RI)


def _in_order(module, rows, config, architecture):
    """Return what has a row for each output of a layer as llama.cpp orders these; Conv1D is (O, I) in an adapter already."""
    if tensors.is_conv1d(f"{module}.weight", architecture):
        return rows
    return tensors.as_llama_cpp(f"{module}.weight", rows, config, architecture)


def _refuse_other_updates(file, adapter, names, config, architecture):
    """Raise ProofFailed unless what llama.cpp will compute of `file` is what was trained, but for float32 rounding."""
    import gguf

    reader = gguf.GGUFReader(file)
    found = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    for module, update in adapter.updates.items():
        stored = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        A_RI, B_OR = found.pop(stored + A), found.pop(stored + B)
        x_I = torch.linspace(1, 2, A_RI.shape[1])
        computed, trained = (
            alpha / len(A_RI) * (B_OR @ (A_RI @ x_I)),
            _in_order(module, update.times(x_I), config, architecture),
        )
        most = abs(update.scaling) * (update.B_OR.float().abs() @ (update.A_RI.float().abs() @ x_I)).max()
        if not bool(((computed - trained).abs() <= 1e-5 * most).all()):
            raise ProofFailed(f"{file}: the update of {module} is not the one that was trained")
    if found:
        raise ProofFailed(f"{file}: has tensors that no layer of the adapter has: {', '.join(sorted(found)[:5])}")
