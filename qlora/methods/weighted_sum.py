"""Several LoRA adapters of one base as one: their weighted sum."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .. import base_model
from ..system.errors import InputError, ProofFailed
from . import read, shapes


def combine(folders, weights, config, trust_remote_code, out):
    """Write one LoRA whose update is the weighted sum of several into folder `out`; return where it lies.

    folders: adapter folders for one base, with this transformers config. Through PEFT's add_weighted_adapter, which
    sets factors side by side ("cat"): the sum is exact, and the rank the sum of the ranks.

    Raises:
        InputError: an adapter that is more than low-rank updates.
        ProofFailed: what PEFT made is not that sum.
    """
    from peft import PeftModel

    parts = [read(folder) for folder in folders]
    for folder, one in zip(folders, parts, strict=True):
        one.refuse_more_than_low_rank("cannot be added to another")
        if one.kind != "LoRA":
            raise InputError(f"adapter {folder}: {one.kind} adapters rescale the weights, so they cannot be summed")
    # PEFT wants a model to put the adapters on; their sum does not depend on its weights, so it gets none
    model = base_model.on_meta(config, trust_remote_code)
    layers = shapes(model)
    for one in parts:
        one.refuse_mismatch(layers, {}, {}, ())
    base_model.replace_by_stand_ins(model)
    names = [f"adapter{number}" for number in range(len(folders))]
    peft_model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for folder, name in zip(folders[1:], names[1:], strict=True):
        peft_model.load_adapter(folder, adapter_name=name)
    for name, one in zip(names, parts, strict=True):
        # PEFT gives the sum the settings of the first: peft 0.21 keeps use_rslora, which scales it by the root of its rank,
        # and what leaves layers out. The layers themselves have been scaled already.
        peft_model.peft_config[name] = dataclasses.replace(
            peft_model.peft_config[name],
            use_rslora=False,
            target_modules=sorted(one.updates),
            exclude_modules=None,
            layers_to_transform=None,
        )
    peft_model.add_weighted_adapter(names, weights, "combined", combination_type="cat")
    peft_model.save_pretrained(out, selected_adapters=["combined"])
    folder = Path(out) / "combined"
    _refuse_another_sum(read(folder), parts, weights)
    return folder


def _refuse_another_sum(found, parts, weights):
    """Raise ProofFailed unless `found` updates each layer by the weighted sum of what `parts` do to it.

    The proof of the export cannot see it: its live model has the same sum.
    """
    layers = {name for part in parts for name in part.updates}
    wrong = layers ^ found.updates.keys()
    for name in layers & found.updates.keys():
        x_I = torch.linspace(-1, 1, found.updates[name].shape[1])
        total = sum(
            weight * part.updates[name].times(x_I)
            for part, weight in zip(parts, weights, strict=True)
            if name in part.updates
        )
        if not torch.allclose(found.updates[name].times(x_I), total, rtol=2e-2, atol=1e-2 * total.abs().max().item()):
            wrong.add(name)
    if wrong:
        raise ProofFailed(
            f"PEFT combined the adapters wrongly in {len(wrong)} layers, such as {min(wrong)}; nothing was exported"
        )
