"""Tiny models of images as ordinary folders, and recipes for them. Classes are colours."""

import pytest
import torch
import transformers
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from qlora.recipe import Recipe
from tests.data.images import folder_of_classes

_SHARED = {"image_size": 32, "num_channels": 3, "initializer_range": 0.1}
_LAYERS = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "patch_size": 8,
}
_SWIN = {"embed_dim": 64, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
CONFIGS = {
    "vit": lambda: transformers.ViTConfig(**_SHARED, **_LAYERS),
    "deit": lambda: transformers.DeiTConfig(**_SHARED, **_LAYERS),
    "swin": lambda: transformers.SwinConfig(**_SHARED, **_SWIN),
    # trains without a plan: its layers cannot be checkpointed
    "convnext": lambda: transformers.ConvNextConfig(**_SHARED, hidden_sizes=[64] * 4, depths=[1] * 4),
}


def model_folder(root, name, kind="Model"):
    """Save a random model of a family as a folder; kind: the end of its class's name."""
    config = CONFIGS[name]()
    torch.manual_seed(0)
    prefix = type(config).__name__.removesuffix("Config")
    getattr(transformers, prefix + kind)(config).save_pretrained(root / name)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(root / name)
    return root / name


def pictures(root):
    """Write train/ and eval/ of three classes, 16 and 5 images each."""
    folder_of_classes(root / "train", 16)
    folder_of_classes(root / "eval", 5, first=16)
    return root


def recipe_of(folder, where, out, **changes):
    """Return a recipe that learns the colours in a few steps; changes: of sections, or nested as dotted names are."""
    values = {
        "task": "image-classification",
        "model": {"name_or_path": str(folder)},
        "data": {"train": str(where / "train"), "eval": str(where / "eval")},
        "training": {
            "max_steps": 10,
            "per_device_train_batch_size": 12,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "constant",
            "optim": "adamw_torch",
            "save_steps": 5,
        },
        "export": {"dtype": "float32"},
        "output_dir": str(out),
    }
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    return Recipe.from_dict(values)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: model_folder(root, name) for name in CONFIGS}
