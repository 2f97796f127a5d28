"""Adapter folders, changed by hand."""

import json

from safetensors.torch import load_file, save_file

from qlora import methods

KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
IDS = [300, 7, 511]
ROWS = "base_model.model.lm_head.token_adapter.trainable_tokens_delta"


def edit_tensors(folder, change):
    tensors = load_file(folder / methods.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / methods.WEIGHTS)


def edit_config(folder, **changes):
    path = folder / methods.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
