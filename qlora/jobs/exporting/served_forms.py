"""A finished run in each form that it can be served in, made one at a time, measured and removed again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import base_model, data, methods
from ...evaluation import latency
from ...exporter import int8, merge, proof
from ...exporter.gguf import converter
from ...exporter.gguf import proof as gguf_proof
from ...exporter.served import Reference, of_llama, of_model, trained_at
from ...recipe import Quantization, parse_size
from ...system import memory
from ...system.errors import InputError, QLoRAError
from ...system.events import note
from ...system.storage import scratch_folder
from ..evaluating.eval_rows import held_out_rows
from ..opening.chosen_task import refuse_classes
from ..opening.opened_model import Subject, open_subject, this_machine, unquantized
from . import export_gguf, export_int8
from .export_folder import refuse_full_disk, write_model
from .export_proof import Prover, found_again


@dataclass(frozen=True)
class Form:
    """what: in words. merge: (base, dtype) of the merged folder that it is made of, None where nothing is merged.

    measure(job, merged folder, empty folder) -> {"bytes", "loss", "kl", "tokens_per_second", "first_token_seconds"}.
    """

    what: str
    merge: tuple | None
    measure: Callable[..., dict]


@dataclass
class Job:
    """What all forms are measured with. plan: merge.Plan. prompt: token ids that an answer's time is measured after."""

    run: Any
    trained: Any
    plan: Any
    device: Any
    rows: list
    reference: Any = None

    @property
    def prompt(self):
        row = self.rows[0]
        return row.input_ids[: trained_at(row)[0]]

    def measured(self, model, num_bytes, what) -> dict:
        """Return the numbers of a torch model as it is loaded."""
        found = {"bytes": num_bytes, **self.reference.scores(of_model(model), what)}
        return found | _speed(latency.seconds_of(model, self.trained.tokenizer, self.prompt))


def open_job(run, trained, data_file, max_rows) -> Job:
    """Return the Job of a finished run; reads no weight. rows: those it has held out, or those of `data_file`.

    Raises:
        InputError: it answers with classes, or there are no rows.
    """
    checkpoint = trained.checkpoint
    refuse_classes(checkpoint.task.file, "qlora compare RUN --served")
    model = base_model.on_meta(trained.config, trained.model.trust_remote_code)
    found = held_out_rows(Subject(model, trained.tokenizer, set(), run.recipe(), run), data_file).first_rows(max_rows)
    rows = [one for one in data.as_supervised(found) if trained_at(one)]
    if not rows:
        raise InputError(f"no rows left to measure on in {data_file or 'the held-out rows'}; `qlora data` shows why")
    base_model.refuse_rows(found, trained.config, trained.adapter.config.get("num_virtual_tokens") or 0)
    adapter = None if trained.adapter.unmergeable else trained.adapter
    plan = merge.plan(checkpoint, trained.config, torch.float16, trained.model.trust_remote_code, adapter)
    return Job(run, trained, plan, base_model.default_device(), rows)


def measure(job, names, scratch) -> list[dict]:
    """Return [{"name", "what", "bytes", "loss", "kl", "tokens_per_second", ...}] of the forms `names`, in their order.

    What did not work has a "message" that says why. scratch: a folder, in which one merged folder and one form lie at a time.

    Raises:
        InputError: the disk is too small for that.
    """
    vocab_size = job.plan.config.get_text_config().vocab_size
    num_tokens = sum(len(trained_at(row)) for row in job.rows)
    most = max(export_gguf.num_bytes("q4_k_m", job.plan), export_int8.num_bytes(job.plan))
    refuse_full_disk(scratch, 4 * vocab_size * num_tokens + job.plan.num_bytes + most)
    model = Prover(job.trained, job.plan, job.device).adapted(job.trained.folder)
    job.reference = Reference(of_model(model), job.rows, scratch / "trained.f32")
    del model
    memory.free_cached()
    found = []
    for wanted, group in itertools.groupby(names, key=lambda name: FORMS[name].merge):
        with scratch_folder(scratch / "merged") as merged:
            problem = _attempt(_write_merged, job, *wanted, merged) if wanted else {}
            for name in group:
                with scratch_folder(scratch / "form") as folder:
                    row = problem or _attempt(FORMS[name].measure, job, merged, folder)
                memory.free_cached()  # peft models hold themselves in cycles
                found.append({"name": name, "what": FORMS[name].what, **_NOTHING, **row})
                note(f"served    {name}: {_in_words(found[-1])}")
    return found


_NOTHING = dict.fromkeys(("bytes", "loss", "kl", "tokens_per_second", "first_token_seconds", "message"))


def _in_words(row):
    if row["loss"] is None:
        return row["message"]
    speed = "" if row["tokens_per_second"] is None else f", {row['tokens_per_second']:.1f} tokens/s"
    return f"loss {row['loss']:.4f}, KL {row['kl']:.1e}{speed}"


def _attempt(function, *arguments) -> dict:
    """Return what the function returns ({} for None), or {"message": why it could not}."""
    try:
        return function(*arguments) or {}
    except QLoRAError as error:
        return {"message": str(error)}
    except Exception as error:  # of a library: one form that it cannot make is no reason to lose the others
        if memory.is_refusal(error):
            return {"message": f"out of memory: {memory.refused(error)}"}
        first = next(iter(str(error).splitlines()), "")
        return {"message": f"{type(error).__name__}: {first}"}


def _write_merged(job, base, dtype, folder):
    trained = job.trained
    if trained.adapter.unmergeable:
        raise InputError(f"{trained.adapter.kind} {trained.adapter.unmergeable}")
    if base == "original":
        _refuse_original(trained)
    export = trained.export.model_copy(update={"dtype": dtype, "base": base})
    changed = dataclasses.replace(trained, export=export)
    specs = [
        dataclasses.replace(spec, dtype=base_model.dtype_of(dtype))
        if spec.dtype == torch.float16 and spec.name not in job.plan.kept
        else spec
        for spec in job.plan.specs
    ]
    plan = dataclasses.replace(job.plan, specs=specs)
    write_model(changed, plan, folder, base, job.device)


def _refuse_original(trained):
    if trained.quantization is None:
        raise InputError("the base was not quantized: there is only one")
    if base_model.stored_quantization(trained.config):
        raise InputError("the base is there in 4 bit only")
    if trained.fitted:
        raise InputError("loftq makes the adapter correct the quantization error, which original weights do not have")


def _trained(job, merged, folder):
    model = open_subject(job.run.path).model
    return job.measured(model, _bytes_of(model), "as trained")


def _beside_original(job, merged, folder):
    trained = job.trained
    _refuse_original(trained)
    base = base_model.load(trained.checkpoint, unquantized(trained.checkpoint, trained.model), None, job.device)
    model = methods.load(base, trained.folder, trained.checkpoint.new_tokens.values())
    return job.measured(model, _bytes_of(model), "the adapter beside the original base")


def _plain(job, merged, folder):
    model = proof.open_folder(merged, job.device, "auto", job.trained.model.trust_remote_code)
    return job.measured(model, _bytes_in(merged), "merged")


def _nf4(job, merged, folder):
    section, checkpoint = found_again(merged, job.trained)
    config = base_model.load_config(checkpoint, section)
    wanted = job.trained.quantization or Quantization()
    section, quantization = base_model.settled(section, wanted, config, this_machine())
    model = base_model.load(checkpoint, section, quantization, job.device)
    return job.measured(model, _bytes_of(model), f"in {quantization.quant_type} again")


def _int8(job, merged, folder):
    trained = job.trained
    export_int8.refuse(trained, job.plan, {})
    int8.write(merged, folder, "bfloat16", parse_size(trained.export.max_shard_size), trained.model.trust_remote_code)
    model = proof.open_folder(folder, torch.device("cpu"), "auto", trained.model.trust_remote_code)
    return job.measured(model, _bytes_in(folder), "in int8")


def _gguf(kind):
    def measure(job, merged, folder):
        export_gguf.refuse(job.trained, job.plan, kind)
        file = folder / f"model-{kind}.gguf"
        num_bytes = converter.write(merged, file, kind)
        if importlib.util.find_spec("llama_cpp") is None:
            return _gguf_without_llama(job, file, num_bytes)
        longest = max(*(len(row.input_ids) for row in job.rows), len(job.prompt) + latency.NUM_TOKENS + 1)
        with gguf_proof.opened(file, longest) as served:
            found = {"bytes": num_bytes, **job.reference.scores(of_llama(served), f"in {kind}, by llama.cpp")}
            return found | _speed(_seconds_in_llama(served, job.prompt))

    return measure


def _gguf_without_llama(job, file, num_bytes):
    from transformers import AutoModelForCausalLM

    with contextlib.redirect_stderr(io.StringIO()):  # a bar that nothing switches off (transformers 5.23)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    found = {"bytes": num_bytes, **job.reference.scores(of_model(model), f"{file.name}, its weights in transformers")}
    why = "its weights, computed by transformers; no tokens/s: llama-cpp-python is not installed"
    return {"message": why} | found


def _seconds_in_llama(served, prompt):
    """Return what latency.seconds_of does, of a model in llama.cpp."""
    first, whole = [], []
    for _ in range(1 + latency.REPEATS):
        served.reset()
        begun = time.perf_counter()
        served.eval(list(prompt))
        first.append(time.perf_counter() - begun)
        for _ in range(latency.NUM_TOKENS):
            served.eval([int(served.scores[served.n_tokens - 1].argmax())])
        whole.append(time.perf_counter() - begun)
    return latency.medians(first, whole)


def _speed(seconds):
    return {
        "tokens_per_second": 1 / seconds["token"] if seconds["token"] > 0 else None,
        "first_token_seconds": seconds["first_token"],
    }


def _bytes_of(model):
    """Return the bytes of a model's tensors: what a folder of it holds, 4-bit weights in 4 bit."""
    return base_model.num_bytes(base_model.tensors(model))


def _bytes_in(folder):
    return sum((Path(folder) / name).stat().st_size for name in set(base_model.weight_files(folder).values()))


_DEQUANTIZED, _ORIGINAL = ("dequantized", "float16"), ("original", "float16")
FORMS = {
    "trained": Form("as trained: base and adapter, live", None, _trained),
    "adapter": Form("adapter beside the 16-bit base", None, _beside_original),
    "float16": Form("merged, float16", _DEQUANTIZED, _plain),
    "nf4": Form("merged, NF4 again", _DEQUANTIZED, _nf4),
    "q8_0": Form("merged, GGUF q8_0", _DEQUANTIZED, _gguf("q8_0")),
    "q4_k_m": Form("merged, GGUF q4_k_m", _DEQUANTIZED, _gguf("q4_k_m")),
    "int8": Form("merged, dynamic int8", _DEQUANTIZED, _int8),
    "bfloat16": Form("merged, bfloat16", ("dequantized", "bfloat16"), _plain),
    "original-float16": Form("original base, merged, float16", _ORIGINAL, _plain),
    "original-nf4": Form("original base, merged, NF4 again", _ORIGINAL, _nf4),
}
