"""The proof of an export: compares the written folder with the live model, both in memory or both layer by layer."""

from __future__ import annotations

import dataclasses
import gc
import math
from typing import Any

import torch

from ... import base_model, methods
from ...evaluation import metrics
from ...exporter import class_proof, int8, proof, streamed
from ...recipe import Model, Quantization
from ...system import memory
from ...system.errors import InputError
from ...system.events import note, progress
from ...system.units import size
from ..opening.chosen_task import pad_of, proof_of


class Prover:
    """Opens the models that are compared, and compares them.

    mode: full (each model whole in memory) or layers (one decoder layer at a time, read from the files); what the recipe
    asks for, or by auto full where it fits.

    Raises:
        InputError: layers is asked for, and the model cannot be read so.
    """

    def __init__(self, trained, plan, device):
        self.trained, self.plan, self.device = trained, plan, device
        self.section = trained.model
        if (
            self.section.attn_implementation not in base_model.OF_TORCH
        ):  # flash attention is bfloat16 whatever it is given
            self.section = self.section.model_copy(update={"attn_implementation": "auto"})
        self.task = trained.checkpoint.task.file
        self.num_rows = _num_rows(plan.config)
        self.proof = proof_of(self.task)
        self.live = None
        self.judged: Any = None
        if self.task.HAS_CLASSES:
            self.mode = "full"
            note("proof     full: both models in memory, one after the other")
            return
        self.need = streamed.need(
            plan.config,
            trained.rows,
            trained.modules if trained.quantization else (),
            trained.adapter,
            bool(trained.checkpoint.new_tokens),
            self.section.trust_remote_code,
            sum(math.prod(spec.shape) for spec in plan.specs if spec.name in plan.kept),
        )
        self.mode = self._mode(trained.export.verify)

    def _mode(self, asked):
        grown = self.num_rows != self.trained.config.get_text_config().vocab_size  # by another tool than new_tokens
        if asked == "layers" and (grown or self.plan.copied):
            why = "has an enlarged vocabulary" if grown else "has experts that are fused when it is loaded"
            raise InputError(f"{self.trained.name}: {why}, so it cannot be checked layer by layer; use --verify full")
        free = memory.available_bytes(self.device)
        fits = self.need.whole < 0.9 * free
        mode = ("full" if fits or grown or self.plan.copied else "layers") if asked == "auto" else asked
        how = (
            "both models in memory"
            if mode == "full"
            else f"one layer at a time, reading the files {self.need.num_passes} times"
        )
        most = memory.anonymous_bytes() + (self.need.whole if mode == "full" else self.need.streamed)
        note(f"proof     {mode}: {how}; needs at most {size(most)}, {size(free)} are free")
        return mode

    def prove(self, folder):
        """Return the part of the report that compares the written `folder` with the live model."""
        dtype = self.trained.export.dtype
        with progress("proof: comparing the trained model with the exported folder"), memory.Peak() as peak:
            self.live = live = self._answers_of_live()
            self.merged = faithful = self._compare(live, self._written(folder))
            self.judged = judged = live
            if self.trained.export.base == "original":
                # what was asked for is the adapter on the original weights, and that is what the folder has to be
                self.judged = judged = self._answers_of_live(original=True)
                faithful = self._compare(judged, self._written(folder))
        failures = self.proof.failures(judged.scores, faithful, judged.base_scores, dtype, judged.num_trained)
        limits = {"kl": proof.KL_LIMIT[dtype], "top1": proof.TOP1_LIMIT[dtype]}
        limits["loss"] = proof.loss_limit(dtype, judged.num_trained)
        if self.task.HAS_CLASSES:
            limits["logits"] = class_proof.LOGITS_LIMIT[dtype]
        report = self._measured(live, failures, peak) | {"merged": dataclasses.asdict(self.merged), "limits": limits}
        if judged is not live:
            report["to_original"] = dataclasses.asdict(faithful)
        return report

    def compare_int8(self, folder):
        """Return (Scores, what is wrong as sentences) of the model in int8 in `folder`; call prove first."""
        with progress("proof: comparing the trained model with the one in int8"):
            opened = proof.open_folder(folder, torch.device("cpu"), "auto", self.section.trust_remote_code)
            scores = self._compare(self.judged, opened)
        return scores, int8.failures(self.judged.scores, scores, self.judged.base_scores)

    def prove_beside(self, folder):
        """Return the part of the report that compares the adapter in the written `folder`, beside its base, with the live model.

        With the base as it was in training it is to be the same; how far it is from that on the weights of the files, where
        these were quantized, is told.
        """
        with progress("proof: comparing the trained model with the adapter in its folder"), memory.Peak() as peak:
            live = self._answers_of_live()
            beside = self._compare(live, self.adapted(folder))
            quantized = self.trained.quantization and base_model.stored_quantization(self.trained.config) is None
            original = self._compare(live, self.adapted(folder, original=True)) if quantized else None
        failures = self.proof.failures(live.scores, beside, live.base_scores, "float32", live.num_trained)
        return self._measured(live, failures, peak) | {
            "beside": dataclasses.asdict(beside),
            "beside_original": original and dataclasses.asdict(original),
        }

    def _measured(self, live, failures, peak):
        return {
            "verify": self.mode,
            "verified": not failures,
            "failures": failures,
            "rows": {"count": len(self.trained.rows), "from": self.trained.rows_from, "positions": live.num_positions},
            "live": {"loss": live.scores.loss, "compute_dtype": "float32"},
            "base_model": dataclasses.asdict(live.base_scores),
            "proof_peak_bytes": peak.bytes,
        }

    def compare(self, folders):
        """Return [{"model", "loss", "perplexity", "kl", "top1"}] of merges ({base: folder}), and of them in 4 bit again.

        Call prove first: `kl` and `top1` are to the live model.
        """
        dtype, quantization = self.trained.export.dtype, self.trained.quantization or Quantization()
        found = []
        with progress("comparing the bases"):
            for base in ("dequantized", "original"):
                is_chosen = base == self.trained.export.base
                scores = self.merged if is_chosen else self._compare(self.live, self._written(folders[base]))
                found.append((f"{base} base, {dtype}", scores))
            for base in ("dequantized", "original"):
                served = self._served(folders[base], quantization)
                found.append((f"{base} base, served in {quantization.quant_type}", self._compare(self.live, served)))
        return [
            {"model": name, "perplexity": metrics.perplexity(scores.loss), **dataclasses.asdict(scores)}
            for name, scores in found
        ]

    def _compare(self, live, model):
        """Return the Scores of `model`, and forget it: the next one needs the room."""
        scores = live.compare(model)
        del model
        self._forget()
        return scores

    def _forget(self):
        gc.collect()  # peft models hold themselves in cycles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _answers_of_live(self, original=False):
        """Return the proof.Live of the adapter on the base that it was trained on, or on the weights of the files."""
        model = self.adapted(self.trained.folder, original)
        if self.task.HAS_CLASSES:
            live: Any = class_proof.Live(model, self.trained.rows, pad_of(self.trained.tokenizer, model))
        else:
            live = proof.Live(model, self.trained.rows, self.need.tokens_at_once if self.mode == "layers" else 0)
        del model
        self._forget()
        return live

    def adapted(self, folder, original=False):
        """Return the base that was trained on, or that of the files, with the adapter in `folder`, in float32."""
        trained, checkpoint = self.trained, self.trained.checkpoint
        quantization = None if original else trained.quantization
        if quantization:  # all numbers as they were before they were cast to what training computed in
            quantization = quantization.model_copy(update={"compute_dtype": "bfloat16"})
        dtype = torch.float32 if original else base_model.DTYPE_WHEN_QUANTIZED
        if self.mode == "layers":
            model = streamed.live(checkpoint, self.section, quantization, self.device, self.plan.source, dtype)
        else:
            device = self.device
            if quantization is None:
                device = proof.device_for(2 * self.plan.num_bytes, device)
            model = base_model.load(checkpoint, self.section, quantization, device, dtype)
            if self.num_rows != _num_rows(model.config):  # another tool grew it
                model.resize_token_embeddings(self.num_rows, mean_resizing=False)
        base_model.to_float32(model)  # before the adapter, which is then not rounded to bfloat16 where it is float32
        return methods.load(model, folder, checkpoint.new_tokens.values())

    def _written(self, folder):
        open_ = streamed.exported if self.mode == "layers" else proof.reload
        return open_(folder, self.device, self.section.trust_remote_code)

    def _served(self, folder, quantization):
        """Return the model in `folder` quantized again, as a server with little memory would load it, in float32."""
        section, checkpoint = found_again(folder, self.trained)
        if self.mode == "layers":
            model = streamed.live(checkpoint, section, quantization, self.device, checkpoint.text_tensors)
        else:
            model = base_model.load(checkpoint, section, quantization, self.device)
        return base_model.to_float32(model)


def found_again(folder, trained):
    """Return (section `model`, checkpoint) of the merged model of a Trained in `folder`."""
    section = Model(name_or_path=str(folder), trust_remote_code=trained.model.trust_remote_code)
    return section, base_model.find(section, task=trained.checkpoint.task)


def _num_rows(config):
    """Return how many rows the embedding of tokens has; None of a model that reads none."""
    return getattr(config.get_text_config(), "vocab_size", None)
