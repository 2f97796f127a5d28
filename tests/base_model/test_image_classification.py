"""What a model for images is held to before it trains."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from qlora import base_model
from qlora.base_model import image_classification
from qlora.system.errors import InputError

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
