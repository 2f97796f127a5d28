"""Adapters with random numbers, saved by qlora and by PEFT alone."""

import warnings

import pytest
import torch

from qlora import methods
from qlora.recipe import Lora


@pytest.fixture
def saved(load_model, tmp_path):
    """Return save(family, section) -> (PeftModel with random factors, its folder)."""

    def save(family="llama", section=Lora(r=4), quantized=True, token_ids=()):  # noqa: B008 (frozen)
        model = load_model(family) if quantized else load_model(family, None)
        model = methods.attach(model, section, token_ids=token_ids)
        torch.manual_seed(3)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path / f"adapter-{family}"
        methods.save(model, folder, "base/name", "main")
        return model.eval(), folder

    return save


@pytest.fixture
def foreign(load_model, tmp_path):
    """Return make(config, family="llama") -> (PeftModel as PEFT alone makes it, with random numbers; its folder)."""
    from peft import get_peft_model

    def make(config, family="llama"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
            warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
            model = get_peft_model(load_model(family), config)
            torch.manual_seed(3)
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()
            model.save_pretrained(tmp_path / "foreign")
        return model.eval(), tmp_path / "foreign"

    return make
