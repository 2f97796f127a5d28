"""What export writes for servers on request: a GGUF file and an Ollama Modelfile, from the folder that was just proven; or the
adapter alone as a GGUF file."""

from __future__ import annotations

import dataclasses
import shlex

import torch

from ...data import chat
from ...exporter import merge
from ...exporter.gguf import adapter, converter, llama_cpp_tools, ollama, proof
from ...system.errors import InputError
from ...system.events import note, progress
from ...system.units import size
from ..opening.chosen_task import refuse_classes

_SIZE = {"f16": 1.0, "q8_0": 0.54, "q4_k_m": 1.35}  # of 2 bytes a number; q4_k_m with the f16 file that it is made from


def num_bytes(kind, plan):
    """Return what writing a GGUF file of this kind takes on the disk, at most."""
    numbers = sum(spec.num_bytes // spec.dtype.itemsize for spec in plan.specs)
    return int(2 * numbers * _SIZE.get(kind, 1.0) * 1.02)


def refuse(trained, plan, kind):
    """Raise InputError before the export where no correct GGUF file could be written after it."""
    checkpoint = trained.checkpoint
    if plan.kept:
        raise InputError(
            f"{checkpoint.folder}: a multimodal checkpoint, which --gguf does not convert; leave it out, and convert the "
            "exported folder with llama.cpp's own convert_hf_to_gguf.py"
        )
    stops = chat.stop_token_ids(trained.tokenizer, trained.generation.generation_config())
    converter.refuse(checkpoint.folder, plan.config, trained.tokenizer, stops, kind)


def add_gguf(trained, folder, name, kind, plan):
    """Write the GGUF file and the Modelfile into the exported `folder`; return their part of the report.

    Raises:
        InputError: the model cannot be converted right.
        ProofFailed: llama.cpp reads another model in the file.
    """
    file = folder / f"{name}-{kind}.gguf"
    with progress(f"writing {file.name}", num_bytes(kind, plan), "bytes") as advance:
        written = converter.write(folder, file, kind, advance)
    tokenizer = trained.tokenizer
    prompts = proof.prompts_of(tokenizer, trained.rows)
    with progress("proof: comparing the exported folder with the GGUF file in llama.cpp"):
        proven = proof.prove(folder, file, kind, prompts)
    if proven.proven:
        said = f"{proven.same_top1:.1%} of {proven.num_tokens} greedy tokens the same, KL {proven.kl:.1e}"
    else:
        said = proven.why_not
    note(f"gguf      {file.name}, {size(written)}: {said}")
    if llama_cpp_tools.converter() is not None:
        note("          written by llama.cpp's own converter: its stop tokens and longer contexts are not proven")
    report = {"file": file.name, "bytes": written, **dataclasses.asdict(proven), "modelfile": None}
    stops = chat.stop_token_ids(tokenizer, trained.generation.generation_config())
    try:
        text = ollama.modelfile(tokenizer, file.name, stops, converter.adds_bos(file))
    except InputError as error:  # the GGUF file is none the worse for it
        note(f"          no Modelfile for Ollama: {error}")
        return report | {"why_no_modelfile": str(error)}
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    note("ollama    Modelfile: its prompts are identical to the chat template's")
    return report | {"modelfile": "Modelfile"}


def write_adapter(trained, out, unused) -> dict:
    """Write the adapter of a Trained to the file `out` as GGUF, for llama.cpp's --lora; return what adapter.write does.

    unused: {option: whether it was given}, of those that a merge has.

    Raises:
        InputError: an option that means nothing here, no new file can be written at `out`, or what llama.cpp does not take.
        ProofFailed: the file does not hold what was trained.
    """
    given = [name for name, there in unused.items() if there]
    if given:
        raise InputError(f"--gguf adapter writes the adapter as it is, in float32; leave {', '.join(given)} out")
    if out.suffix != ".gguf":
        raise InputError(f"--gguf adapter writes one file; give its name, which ends in .gguf, with --out, not {out}")
    converter.refuse_taken(out)
    trained.adapter.refuse_untrained()
    refuse_classes(trained.checkpoint.task.file, "--gguf adapter")
    what = (trained.adapter, trained.checkpoint.folder, trained.config)
    merged = f"merge it: qlora export {shlex.quote(trained.name)} --out FOLDER --gguf f16"
    adapter.refuse(*what, trained.adapter.unmergeable or merged)
    merge.plan(trained.checkpoint, trained.config, torch.float32, trained.model.trust_remote_code, trained.adapter)
    found = adapter.write(*what, out, out.stem)
    note(
        f"gguf      {out}, {size(found['bytes'])}: {found['modules']} layers, read back and compared; not tried in llama.cpp"
    )
    note("          it answers as trained beside the base in 4 bit; beside another GGUF of the base it may differ")
    return found
