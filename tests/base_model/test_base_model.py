"""The base is exactly what the files hold, in NF4 and bfloat16; anything less is an error."""

import json
import math
import shutil

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from qlora import base_model, methods
from qlora.recipe import Lora, Model, Quantization
from qlora.system import memory
from qlora.system.errors import InputError
from tests.conftest import FAMILIES


def load(folder, **settings):
    section = Model(name_or_path=str(folder))
    return base_model.load(base_model.find(section), section, Quantization(**settings))


@pytest.fixture
def broken(tiny_model, tmp_path):
    """A copy of a tiny model to break."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- NF4 itself ------------------------------------------------------------------------------------------------------


def test_nf4_round_trip_error_is_that_of_the_data_type():
    # Mean absolute error on N(0, 1) in blocks of 64, over 20 other seeds of 2^18 numbers: 0.07281, standard deviation
    # 1.5e-4 (without double quantization). Five deviations either side; 8-bit absmax adds 7.4e-5.
    errors = {False: [], True: []}
    for seed in range(5):
        W = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
        for double in errors:
            codes, state = quantize_4bit(W, blocksize=64, quant_type="nf4", compress_statistics=double)
            errors[double].append((dequantize_4bit(codes, state) - W).abs().mean().item())
    plain, double = (sum(found) / len(found) for found in errors.values())
    assert abs(plain - NF4_ERROR_MEAN) < 5 * NF4_ERROR_STD
    assert 0 < double - plain < 2e-4


NF4_ERROR_MEAN, NF4_ERROR_STD = 0.07281, 1.5e-4


def test_a_number_costs_4_127_bits():
    weight = Params4bit(torch.randn(1024, 1024), compress_statistics=True, quant_type="nf4").to("cpu")
    expected = 4 + 8 / 64 + 32 / (64 * 256)
    assert memory.stored_bits_per_parameter(weight.quant_state, weight.data) == expected
    plain = Params4bit(torch.randn(1024, 1024), compress_statistics=False, quant_type="nf4").to("cpu")
    assert memory.stored_bits_per_parameter(plain.quant_state, plain.data) == 4 + 32 / 64


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_a_quantized_layer_is_a_plain_layer_on_the_dequantized_weight(load_model, family):
    model = load_model(family)
    for name, module in base_model.quantized_modules(model).items():
        x = torch.randn(3, 5, module.in_features, dtype=torch.bfloat16)
        W = dequantize_4bit(module.weight.data, module.weight.quant_state)
        expected = F.linear(x, W, module.bias)
        torch.testing.assert_close(module(x), expected, msg=name)


# ---- dtype policy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_parameter_names_by_dtype_are_exactly_these(load_model, family):
    model = methods.attach(load_model(family), Lora(r=4))
    by_dtype = {}
    for name, parameter in model.named_parameters():
        by_dtype.setdefault(parameter.dtype, set()).add(name)
    linear = {f"base_model.model.{name}" for name in base_model.linear_names(model.get_base_model())}
    linear = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
    assert by_dtype.pop(torch.uint8) == {f"{name}.base_layer.weight" for name in linear}
    assert set(by_dtype) == {torch.bfloat16}  # nothing in float32
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{name}.lora_{factor}.default.weight" for name in linear for factor in "AB"}


def test_llama_has_these_linear_layers(load_model):
    # the golden set that the test above derives from the model itself
    names = {name.split(".", 3)[3] for name in base_model.linear_names(load_model("llama"))}
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    assert names == attention | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


def test_the_head_and_the_embedding_are_not_quantized(load_model):
    for family in ("llama", "llama-tied", "gpt2", "phi"):
        model = load_model(family)
        assert model.get_output_embeddings().weight.dtype == torch.bfloat16
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_float32_compute_is_explicit_and_exact(tiny_model):
    model = load(tiny_model("llama"), compute_dtype="float32")
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.float32}
    module = model.model.layers[0].mlp.up_proj
    bf16 = load(tiny_model("llama")).model.layers[0].mlp.up_proj
    assert torch.equal(module.weight.data, bf16.weight.data)  # the same codes: W is bf16 when it is quantized
    exact = dequantize_4bit(module.weight.data, module.weight.quant_state)
    rounded = dequantize_4bit(bf16.weight.data, bf16.weight.quant_state)
    assert exact.dtype == torch.float32
    assert torch.equal(exact.bfloat16(), rounded)
    assert not torch.equal(exact, rounded.float())


def test_without_quantization_every_parameter_is_bfloat16(load_model):
    model = load_model("gpt2", None)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert base_model.quantized_modules(model) == {}


def test_parameters_are_counted_as_the_numbers_they_stand_for(load_model):
    quantized, plain = load_model("llama-tied"), load_model("llama-tied", None)
    assert base_model.num_parameters(quantized) == base_model.num_parameters(plain) == (0, plain.num_parameters())


# ---- the CPU repack --------------------------------------------------------------------------------------------------


def gradients(model, evaluate_first):
    model = methods.attach(model, Lora(r=4))
    ids = torch.arange(1, 33)[None]
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    if evaluate_first:
        with torch.no_grad():
            model.eval()(input_ids=ids)
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_evaluating_leaves_weights_and_gradients_as_they_were(load_model, family):
    torch.manual_seed(1)
    never = gradients(load_model(family), evaluate_first=False)
    torch.manual_seed(1)
    after = gradients(load_model(family), evaluate_first=True)
    assert never.keys() == after.keys()
    for name in never:
        assert never[name] is not None
        assert never[name].abs().sum() > 0
        assert torch.equal(never[name], after[name]), name


def test_the_repack_is_turned_off_in_every_layer(load_model):
    modules = base_model.quantized_modules(load_model("llama"))
    assert len(modules) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in modules.values())


# ---- files -----------------------------------------------------------------------------------------------------------


def test_sharded_and_single_files_give_the_same_model(tiny_model):
    single, sharded = tiny_model("llama"), tiny_model("llama", "100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    one, other = load(single).state_dict(), load(sharded).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_missing_weight_is_an_error_never_a_random_tensor(broken):
    rewrite(broken, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        load(broken)


def test_a_weight_that_the_config_does_not_know_is_an_error(broken):
    rewrite(
        broken, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(128, 64, dtype=torch.bfloat16)})
    )
    with pytest.raises(InputError, match=r"not used by this architecture: model.layers.2.mlp.up_proj.weight"):
        load(broken)


def test_a_weight_of_another_shape_is_an_error(broken):
    rewrite(broken, lambda t: t.update({"model.norm.weight": torch.ones(65, dtype=torch.bfloat16)}))
    with pytest.raises(InputError, match=r"model.norm.weight"):
        load(broken)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]), "not a complete"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is empty"),
        (lambda f: (f / "model.safetensors").write_text("<html>login</html>" * 9), "is a web page"),
        (lambda f: (f / "model.safetensors").write_text("version https://git-lfs"), "not a complete safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json"),
        (lambda f: edit_config(f, model_type="llamoid"), "llamoid"),
        (lambda f: edit_config(f, model_type="vit"), "'vit' is not a causal language model"),
        (lambda f: edit_config(f, model_type="bert"), "the model has"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "quantized already"),
        (lambda f: edit_config(f, hidden_size=128), "the model has"),
    ],
    ids=["cut off", "empty", "html", "lfs pointer", "no weights", "no config", "broken config", "unknown architecture",
         "vision", "encoder", "quantized", "wrong size"],
)  # fmt: skip
def test_a_broken_model_folder_is_an_input_error(broken, break_it, expected):
    break_it(broken)
    with pytest.raises(InputError, match=expected):
        load(broken)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/x.safetensors", "a/b.safetensors", "weights.bin"])
def test_an_index_that_points_out_of_the_folder_is_refused(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model("llama", "100KB"), tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="not a plain safetensors file name"):
        load(folder)


def test_pickled_weights_are_never_read(broken):
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are not read"):
        load(broken)


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_one_message():
    with pytest.raises(InputError, match="no such folder, and not a hub name"):
        base_model.find(Model(name_or_path="./none"))
    with pytest.raises(InputError, match="the hub says"):  # offline in the tests
        base_model.find(Model(name_or_path="nobody/nothing"))


def test_a_revision_of_a_local_folder_is_refused(tiny_model):
    with pytest.raises(InputError, match="has no revisions"):
        base_model.find(Model(name_or_path=str(tiny_model("llama")), revision="main"))


def test_a_hub_name_is_loaded_at_its_pinned_revision(tiny_model, tmp_path, monkeypatch):
    # The one thing the network would bring: a snapshot in the hub's cache layout.
    revision = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    shutil.copytree(tiny_model("llama"), cache / "models--me--tiny" / "snapshots" / revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    checkpoint = base_model.find(Model(name_or_path="me/tiny", revision=revision))
    assert checkpoint.revision == revision
    assert checkpoint.name_or_path == "me/tiny"
    assert checkpoint.shapes()["model.norm.weight"] == (64,)


def test_a_tokenizer_that_is_missing_is_an_input_error(broken):
    for path in broken.glob("token*"):
        path.unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        base_model.load_tokenizer(broken, Model(name_or_path=str(broken)))


# ---- new tokens ------------------------------------------------------------------------------------------------------

LENGTH = 278  # of the tokenizer; the models have 512 rows


def with_tokens(folder, tokens):
    section = Model(name_or_path=str(folder), new_tokens=tokens)
    checkpoint = base_model.find(section)
    return section, checkpoint


@pytest.mark.parametrize(("family", "count"), [("llama", 3), ("llama", 300), ("llama-tied", 300), ("gpt2", 300)])
def test_rows_of_new_tokens_start_at_the_mean_and_the_others_stay(tiny_model, load_model, family, count):
    section, checkpoint = with_tokens(tiny_model(family), ["<|im_end|>", *(f"<t{n}>" for n in range(count))])
    assert list(checkpoint.new_tokens.values()) == [2, *range(LENGTH, LENGTH + count)]
    assert checkpoint.added == set(range(LENGTH, LENGTH + count))
    before, after = load_model(family), base_model.load(checkpoint, section, Quantization())
    num_rows = max(512, LENGTH + count)
    assert after.config.vocab_size == num_rows
    assert base_model.load_config(checkpoint, section).vocab_size == num_rows
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, name)().weight for model in (before, after))
        assert new.shape == (num_rows, 64)
        assert not new.requires_grad
        mean = old.double().mean(0).bfloat16()
        torch.testing.assert_close(
            new[LENGTH : LENGTH + count], mean.expand(count, -1), atol=1e-6, rtol=2**-7
        )  # an ulp
        assert torch.equal(new[:LENGTH], old[:LENGTH])
        assert torch.equal(new[LENGTH + count :], old[LENGTH + count :])  # spare rows that stay spare
    assert len(base_model.quantized_modules(after)) == len(base_model.quantized_modules(before))
    tied = after.get_input_embeddings().weight is after.get_output_embeddings().weight
    assert tied == (family != "llama")


def test_tokens_of_the_template_are_special_and_the_others_survive_decoding(tokenizer, tmp_path):
    tokenizer.chat_template = "<turn>" + tokenizer.chat_template
    ids = base_model.add_tokens(tokenizer, ["<turn>", "<call>", "<|im_start|>", "{}"])
    assert ids == {"<turn>": LENGTH, "<call>": LENGTH + 1, "<|im_start|>": 1, "{}": LENGTH + 2}
    tokenizer.save_pretrained(tmp_path)
    read = base_model.load_tokenizer(tmp_path, Model(name_or_path=str(tmp_path)))
    for one in (tokenizer, read):
        assert {token: one.added_tokens_decoder[ids[token]].special for token in ids} == {
            "<turn>": True,
            "<call>": False,
            "<|im_start|>": True,
            "{}": False,
        }
        found = one("a<turn>b<call>{}c", add_special_tokens=False).input_ids
        assert [token for token in found if token >= LENGTH] == [LENGTH, LENGTH + 1, LENGTH + 2]
        assert one.decode(found, skip_special_tokens=True) == "ab<call>{}c"
    assert len(read) == LENGTH + 3


def test_no_new_tokens_change_nothing(tokenizer):
    before = tokenizer.get_vocab()
    assert base_model.add_tokens(tokenizer, None) == {}
    assert tokenizer.get_vocab() == before


def test_a_word_of_the_vocabulary_is_kept_and_not_split_off_in_other_words(tokenizer):
    word = next(w for w in ("is", "er", "us", "at") if len(tokenizer(w).input_ids) == 1)
    other = f"x{word}tance"
    before = tokenizer(other).input_ids
    assert base_model.add_tokens(tokenizer, [word]) == {word: tokenizer(word).input_ids[0]}
    assert tokenizer(other).input_ids == before
    assert len(tokenizer) == LENGTH


def test_a_word_that_the_tokenizer_does_not_know_is_added_and_not_taken_for_the_unknown_token():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert base_model.add_tokens(tokenizer, ["a", "b", "<unk>"]) == {"a": 1, "b": 2, "<unk>": 0}
    assert tokenizer("b a c").input_ids == [2, 1, 0]


@pytest.mark.parametrize("prefix", ["normalizer", "pre-tokenizer"])
def test_in_a_sentencepiece_vocabulary_a_new_token_is_one_wherever_it_stands(tmp_path, prefix):
    # as Llama-2 and Mistral have it: a space is a mark that the text, but not what follows a token, is begun with
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    words = Tokenizer(models.BPE(unk_token="<unk>"))
    if prefix == "normalizer":
        words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words.train_from_iterator(["say yes or no to me"] * 9, trainers.BpeTrainer(special_tokens=["<unk>"], vocab_size=60))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    length = len(tokenizer)
    assert base_model.add_tokens(tokenizer, ["<call>"]) == {"<call>": length}
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("<call>", "say <call>", "<call>say<call>"):
            assert one(text).input_ids.count(length) == text.count("<call>"), text
            assert "<call>" in one.decode(one(text).input_ids, skip_special_tokens=True)
        assert one("<call>", add_special_tokens=False).input_ids == [length]


def test_with_nothing_but_known_tokens_no_row_is_touched(tiny_model, load_model):
    section, checkpoint = with_tokens(tiny_model("llama"), ["<|im_start|>"])
    assert checkpoint.added == set()
    model, base = base_model.load(checkpoint, section, Quantization()), load_model("llama")
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert torch.equal(model.lm_head.weight, base.lm_head.weight)


def test_two_texts_for_one_token_are_refused(tokenizer):
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="to this tokenizer 'a' and 'A' are one token; keep one"):
        base_model.add_tokens(tokenizer, ["a", "A"])


def test_a_token_that_the_tokenizer_has_and_the_model_has_no_row_for_is_named(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    tokenizer = base_model.load_tokenizer(folder, Model(name_or_path=str(folder)))
    tokenizer.add_tokens([f"<extra{number}>" for number in range(512 - LENGTH)] + ["<pad>"])
    tokenizer.save_pretrained(folder)
    section, checkpoint = with_tokens(folder, ["<call>"])
    with pytest.raises(
        InputError, match=r"the model has 512 embeddings, .*\('<pad>'\); list these in model.new_tokens"
    ):
        base_model.load_config(checkpoint, section)
    section, checkpoint = with_tokens(folder, ["<call>", "<pad>"])
    assert base_model.load_config(checkpoint, section).vocab_size == 514
    assert checkpoint.added == {513}


# ---- a width that bitsandbytes gets wrong on a CPU -------------------------------------------------------------------


def test_bitsandbytes_dequantizes_rows_that_are_no_blocks_wrongly_on_a_cpu():
    # Once this fails, the refusal below has served its time.
    W = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 65)[:, None]
    codes, state = quantize_4bit(W, blocksize=64, quant_type="nf4")
    by_rows = (dequantize_4bit(codes, state) - W).norm() / W.norm()
    state.shape = torch.Size((96, 64))
    by_blocks = (dequantize_4bit(codes, state).view(64, 96) - W).norm() / W.norm()
    assert by_blocks < 0.15
    assert by_rows > 2 * by_blocks


def test_a_model_of_such_a_width_is_refused_on_a_cpu_and_trained_without_quantization(tmp_path):
    config = FAMILIES["llama"]()
    config.intermediate_size = 96
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert "model.layers.1.mlp.down_proj: 96 inputs" in str(caught.value)
    assert "up_proj" not in str(caught.value)
    section = Model(name_or_path=str(tmp_path))
    assert base_model.load(base_model.find(section), section, None) is not None


def test_a_buffer_that_the_architecture_leaves_in_the_files_may_be_infinite(tmp_path, tokenizer):
    # files of GPT-NeoX in float16 hold a masked_bias of -1e9, which is -inf there, and no code reads it any more
    config = transformers.GPTNeoXConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9).half()
    assert tensors["gpt_neox.layers.0.attention.masked_bias"].isinf()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = load(tmp_path)
    assert len(base_model.quantized_modules(model)) == 4
    tensors["gpt_neox.layers.0.attention.query_key_value.bias"][0] = math.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 problem\n  gpt_neox.layers.0.attention.query_key_value.bias: contains non-finite"
    ):
        load(tmp_path)


def test_a_repository_in_the_hubs_cache_means_its_snapshot(tiny_model, tmp_path):
    repository = tmp_path / "models--me--tiny"
    for revision in ("aaa", "bbb"):
        (repository / "snapshots").mkdir(parents=True, exist_ok=True)
        (repository / "snapshots" / revision).symlink_to(tiny_model("llama"))
    section = Model(name_or_path=str(repository))
    with pytest.raises(InputError, match=r"give one of its 2 snapshots:\n.*snapshots/aaa\n.*snapshots/bbb"):
        base_model.find(section)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb\n")
    assert base_model.find(section).folder == repository / "snapshots" / "bbb"
    (repository / "snapshots" / "bbb").unlink()
    assert base_model.find(section).folder == repository / "snapshots" / "aaa"
    (repository / "snapshots" / "aaa").unlink()
    with pytest.raises(InputError, match="it has no snapshot; download it again"):
        base_model.find(section)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_are_causal(load_model, tiny_model, family):
    checkpoint = base_model.find(Model(name_or_path=str(tiny_model(family))))
    base_model.refuse_not_causal(load_model(family), checkpoint)


def test_a_model_that_sees_its_answers_is_refused_before_training(make_recipe, tiny_model, tmp_path):
    """A BERT folder loads as BertLMHeadModel, whose attention goes both ways unless its config says is_decoder."""
    vocab_size = len(transformers.AutoTokenizer.from_pretrained(tiny_model("llama")))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    for is_decoder in (False, True):
        folder = tmp_path / f"bert-{is_decoder}"
        config = transformers.BertConfig(vocab_size=vocab_size, **shape, is_decoder=is_decoder)
        transformers.BertLMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(tiny_model("llama")).save_pretrained(folder)
        section = Model(name_or_path=str(folder))
        checkpoint = base_model.find(section)
        model = base_model.load(checkpoint, section, Quantization())
        if is_decoder:
            base_model.refuse_not_causal(model, checkpoint)
        else:
            with pytest.raises(InputError, match=r"BertLMHeadModel is not causal: .* is_decoder: false"):
                base_model.refuse_not_causal(model, checkpoint)
