"""The image processor of a folder, as old and new versions of transformers have written it; and what is refused."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from qlora import base_model
from qlora.base_model import image_processor
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
