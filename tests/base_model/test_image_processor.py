"""A model of images: its image processor, as all versions of transformers have written it, and what it is held to."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qlora import base_model
from qlora.base_model import image_classification, image_processor
from qlora.recipe import Model
from qlora.system.errors import InputError

SECTION = Model(name_or_path="x")
OLD = {"do_resize": True, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
FILES = {
    "feature extractor of version 4.5": {**OLD, "feature_extractor_type": "ViTFeatureExtractor", "size": 64},
    "fast one of version 4.50": {
        **OLD,
        "image_processor_type": "ViTImageProcessorFast",
        "size": {"height": 64, "width": 64},
    },
    "crop of DeiT": {
        **OLD,
        "image_processor_type": "DeiTImageProcessor",
        "size": {"height": 80, "width": 80},
        "do_center_crop": True,
        "crop_size": {"height": 64, "width": 64},
    },
    "crop of the shorter side": {
        **OLD,
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 80},
        "do_center_crop": True,
        "crop_size": {"height": 64, "width": 64},
    },
}


@pytest.fixture
def folder_with(tmp_path):
    def write(settings):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
        transformers.ViTConfig(image_size=64).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("kind", FILES)
def test_files_of_all_versions_give_the_pillow_one(folder_with, kind):
    processor = base_model.load_image_processor(folder_with(FILES[kind]), SECTION)
    assert type(processor).__name__.endswith("Pil")  # whatever is installed: pytorch/vision#2950
    assert image_processor.image_shape(processor) == (3, 64, 64)
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 70, 3), dtype=np.uint8))
    found = base_model.pixel_values(processor, [pixels, pixels], torch.bfloat16)
    assert (found.shape, found.dtype) == ((2, 3, 64, 64), torch.bfloat16)
    assert found.abs().max() <= 1


def test_it_belongs_to_the_model_or_is_refused(folder_with):
    folder = folder_with(FILES["crop of DeiT"])
    processor = base_model.load_image_processor(folder, SECTION)
    image_processor.refuse_other_shape(processor, transformers.ViTConfig(image_size=64), folder)
    image_processor.refuse_other_shape(processor, transformers.ResNetConfig(), folder)  # any size is right
    for config, said in (
        (
            transformers.ViTConfig(image_size=(64, 32)),
            "64 x 64 pixels, and config.json of the model is for 32 x 64 pixels",
        ),
        (transformers.ViTConfig(image_size=64, num_channels=1), "for 64 x 64 pixels in 1 channels"),
    ):
        with pytest.raises(InputError, match=said):
            image_processor.refuse_other_shape(processor, config, folder)


def test_its_identity_is_that_of_its_settings(folder_with):
    one, same, other = (
        image_processor.identity(base_model.load_image_processor(folder_with(FILES["crop of DeiT"] | change), SECTION))
        for change in ({}, {}, {"image_mean": [0.4] * 3})
    )
    assert one == same != other


# ---- before it trains ------------------------------------------------------------------------------------------------


HERE = SimpleNamespace(folder="somewhere")


def test_batch_normalization_is_refused_because_frozen_layers_would_change():
    model = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    )
    with pytest.raises(InputError, match="ResNetForImageClassification has batch normalization"):
        image_classification.refuse_unsuitable(model, HERE)


def test_a_model_that_does_not_compute_in_its_dtype_is_refused():
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=16
    )
    model = transformers.ViTForImageClassification(config).eval()
    image_classification.refuse_unsuitable(model, HERE)
    model.classifier.to(torch.float64)
    with pytest.raises(InputError, match=r"does not compute in float32: .*compute_dtype=float32"):
        image_classification.refuse_unsuitable(model, HERE)


def test_position_biases_made_by_small_networks_are_left_alone():
    config = transformers.Swinv2Config(
        embed_dim=64, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4
    )
    model = transformers.Swinv2ForImageClassification(config)
    names = base_model.linear_names(model)
    assert names
    assert not any("position_bias_mlp" in name or "classifier" in name for name in names)
