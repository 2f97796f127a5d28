"""The parts of a model that others ask for."""

from qlora import base_model


def test_llama_has_these_linear_layers(load_model):
    # the golden set that test_loading.py derives from the model itself
    names = {name.split(".", 3)[3] for name in base_model.linear_names(load_model("llama"))}
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    assert names == attention | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def test_parameters_are_counted_as_the_numbers_they_stand_for(load_model):
    quantized, plain = load_model("llama-tied"), load_model("llama-tied", None)
    assert base_model.num_parameters(quantized) == base_model.num_parameters(plain) == (0, plain.num_parameters())
