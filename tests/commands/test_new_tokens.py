"""New tokens the whole way: added once, their rows trained and no others, and in the exported folder as in the run."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlora import base_model, methods
from qlora.commands.chat import chat
from qlora.commands.data import inspect_data
from qlora.commands.eval import evaluate
from qlora.commands.export import export
from qlora.commands.train import train
from qlora.data import chat as chat_format
from qlora.jobs.opening.prepared_data import prepare
from qlora.recipe import Recipe
from qlora.system.errors import InputError
from tests.conftest import messages, some_slow, write_jsonl

KEPT = "<|im_start|>"  # in the vocabulary already
NEW = ["<call>", KEPT, "</call>"]
LENGTH = 278  # of the tokenizer in conftest
TURNS = [
    [("user", f"<call> {a} plus {b}?"), ("assistant", f"<call>{a + b}</call>")] for a in range(6) for b in range(4)
]
TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)


@pytest.fixture
def recipe_of(make_recipe, tiny_model, tmp_path):
    """Return make(family, spare=True, **sections) -> a Recipe with NEW, for a model with 234 rows to spare or with none."""

    def make(family="llama", spare=True, **sections):
        folder = tiny_model(family)
        if not spare:
            folder = shutil.copytree(folder, tmp_path / "model")
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            model.resize_token_embeddings(LENGTH)
            model.save_pretrained(folder)
        rows = write_jsonl(tmp_path / "calls.jsonl", [{"messages": messages(turns)} for turns in TURNS])
        values = {
            "model": {"name_or_path": str(folder), "new_tokens": NEW},
            "data": {"train": str(rows)},
            "training": {"max_steps": 3},
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return make_recipe(family, **values)

    return make


def live_model(recipe, run):
    checkpoint = base_model.find(recipe.model)
    model = base_model.load(checkpoint, recipe.model, recipe.quantization)
    return base_model.to_float32(methods.load(model, run.adapter, checkpoint.new_tokens.values()))


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


BASES = [("llama", False), ("llama", True), ("llama-tied", False), ("qwen2", True), ("gpt2", False), ("gemma2", False)]


@pytest.mark.parametrize(("family", "spare"), some_slow(BASES, but=[("llama", False)]))
@pytest.mark.usefixtures("unplanned")
def test_the_exported_rows_are_the_trained_ones_and_all_others_the_bases(recipe_of, tmp_path, family, spare):
    recipe = recipe_of(family, spare)
    run = train(recipe)
    report = export(run.path, tmp_path / "out", dtype="float32")
    assert report["verified"]
    assert report["new_tokens"] == {"<call>": LENGTH, KEPT: 1, "</call>": LENGTH + 1}

    # opened without this package
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = [tokenizer(token, add_special_tokens=False).input_ids for token in NEW]
    assert ids == [[LENGTH], [1], [LENGTH + 1]]
    num_rows = 512 if spare else LENGTH + 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == num_rows == exported.get_input_embeddings().weight.shape[0]

    saved = load_file(run.adapter / methods.WEIGHTS)
    trained = {key: tensor for key, tensor in saved.items() if ".lora_" not in key}
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.bfloat16)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert (exported.get_output_embeddings().weight is exported.get_input_embeddings().weight) == tied
    assert len(trained) == (1 if tied else 2)
    for key, rows in trained.items():
        module = key.removeprefix("base_model.model.").removesuffix(".token_adapter.trainable_tokens_delta")
        before, after = (model.get_submodule(module).weight.detach().float() for model in (base, exported))
        assert torch.equal(after[[LENGTH, 1, LENGTH + 1]], rows.float())
        others = [row for row in range(len(before)) if row not in {LENGTH, 1, LENGTH + 1}]
        assert torch.equal(after[others], before[others])
        # ... and training moved them, away from where they started
        assert (rows[[0, 2]].float() - before.mean(0)).abs().amax(1).min() > 0.005
        assert (rows[1].float() - before[1]).abs().max() > 0.005

    # the live NF4 + adapter model on one side, plain transformers on the other
    live, sample = live_model(run.recipe(), run), torch.tensor([[*range(4, 40), LENGTH, 60, LENGTH + 1, 1, 70]])
    difference = (logits(exported, sample) - logits(live, sample)).abs().max()
    with live.disable_adapter():
        from_base = (logits(exported, sample) - logits(live, sample)).abs().max()
    assert difference < 1e-4 * from_base


@pytest.mark.usefixtures("unplanned")
def test_the_model_learns_to_say_new_tokens_and_to_end_with_one(recipe_of, tmp_path):
    (tmp_path / "turns.jinja").write_text(TEMPLATE)
    recipe = recipe_of(
        "llama",
        spare=False,
        model={"new_tokens": ["<turn>", "<end>", "<call>", "</call>"]},
        lora={"r": 16, "lora_alpha": 32},
        data={"chat_template": str(tmp_path / "turns.jinja"), "eval_fraction": 0.25},
        training={"max_steps": 60, "per_device_train_batch_size": 6, "optim": "adamw_torch"},
    )
    run = train(recipe)
    result = evaluate(run.path)
    assert result["loss"] < 0.5 * result["before"]["loss"]
    export(run.path, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    turn, end, call, end_of_call = range(LENGTH, LENGTH + 4)
    assert tokenizer("<turn><end><call></call>", add_special_tokens=False).input_ids == [turn, end, call, end_of_call]
    assert (
        tokenizer.decode([turn, end, call, end_of_call], skip_special_tokens=True).replace(" ", "") == "<call></call>"
    )
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert end in generation["eos_token_id"]
    for target in (run.path, tmp_path / "out"):
        answer = chat(target, TURNS[5][0][1], max_new_tokens=40)
        assert answer.startswith("<call>")
        assert answer.endswith("</call>")  # it stopped by itself, and the token at which it did is not shown


@pytest.fixture
def base_folder(tiny_model, tmp_path):
    """A model folder without a chat template, whose tokenizer knows letters and <|endoftext|> alone: 257 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    alphabet = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    (folder / "chat_template.jinja").unlink()
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", [None, "chatml"])
def test_a_base_model_gets_chatml_by_its_two_markers(make_recipe, base_folder, template):
    recipe = make_recipe(model={"name_or_path": str(base_folder), "new_tokens": list(chat_format.CHATML_MARKERS)},
                         data={"chat_template": template})  # fmt: skip
    prepared = prepare(recipe)
    assert prepared.template.startswith("ChatML, built in")
    assert prepared.report["ends_with_stop_token"] == 1
    assert prepared.checkpoint.new_tokens == {"<|im_start|>": 257, "<|im_end|>": 258}
    text = prepared.tokenizer.decode(prepared.examples[0].input_ids)
    assert text.startswith("<|im_start|>user\n")
    assert prepared.tokenizer.decode([257, 5, 258], skip_special_tokens=True) == prepared.tokenizer.decode([5])
    assert 258 in chat_format.stop_token_ids(prepared.tokenizer)
    if template is not None:
        with pytest.raises(InputError, match="are not tokens of this model"):
            prepare(recipe.model_copy(update={"model": recipe.model.model_copy(update={"new_tokens": None})}))


def test_what_only_chatml_writes_is_ordinary_where_another_template_is_used(make_recipe, base_folder):
    recipe = make_recipe(model={"name_or_path": str(base_folder), "new_tokens": ["<tool_call>", "</tool_call>"]})
    prepared = prepare(recipe)
    assert "<tool_call>" in chat_format.CHATML
    assert prepared.template.startswith("built in (the model has none): <|role|> headers")
    assert prepared.tokenizer.decode([257, 258], skip_special_tokens=True).replace(" ", "") == "<tool_call></tool_call>"


@pytest.mark.slow
def test_without_quantization_and_with_checkpoints_and_packing_rows_are_trained_too(recipe_of, tmp_path):
    recipe = recipe_of("qwen2", False, data={"packing": True}, memory={"gradient_checkpointing": True})
    run = train(Recipe.from_dict({**recipe.model_dump(), "quantization": None}))
    assert export(run.path, tmp_path / "out", dtype="bfloat16")["verified"]
    rows, ids = methods.read(run.adapter).rows["model.embed_tokens"][::-1]
    assert ids == [LENGTH, 1, LENGTH + 1]
    base = transformers.AutoModelForCausalLM.from_pretrained(recipe.model.name_or_path, dtype=torch.bfloat16)
    mean = base.get_input_embeddings().weight.detach().float().mean(0)
    assert (rows[[0, 2]].float() - mean).abs().amax(1).min() > 0.005


def test_other_tokens_than_at_training_are_refused_by_every_verb(recipe_of, tmp_path):
    run = train(recipe_of(training={"max_steps": 1}))
    verbs = {
        "null": lambda changed: export(run.path, tmp_path / "out", overrides=changed),
        "[<call>]": lambda changed: evaluate(run.path, overrides=changed),
        "[<call>, <|im_start|>, </call>, <other>]": lambda changed: chat(run.path, "hi", overrides=changed),
    }
    for tokens, verb in verbs.items():
        with pytest.raises(InputError, match=r"has embedding rows for tokens \[1, 278, 279\] in lm_head, .*need "):
            verb([f"model.new_tokens={tokens}"])
        with pytest.raises(
            InputError, match=r"its tokenizer has model.new_tokens with the ids {'</call>': 279, .* gives them"
        ):
            verb(["model.new_tokens=[</call>, <|im_start|>, <call>]"])
    assert not (tmp_path / "out").exists()


def test_data_shows_a_new_token_as_one_and_reads_no_weights(recipe_of, capsys):
    inspect_data(recipe_of(spare=False), row=1, tokens=True)
    shown = capsys.readouterr().out
    assert f"'<call>':{LENGTH}" in shown.replace("[[", "").replace("]]", "")


def test_a_head_with_a_bias_is_refused_before_the_model_is_loaded(recipe_of, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "load", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="the head of PhiForCausalLM has a bias, which PEFT loses"):
        train(recipe_of("phi"))
    assert not (tmp_path / "run").exists()


def test_peft_loses_the_bias_of_a_head_whose_rows_it_trains(load_model):
    """Why such a head is refused (PEFT 0.21): once this fails, token_modules can let it through."""
    from peft import LoraConfig, get_peft_model

    model = load_model("phi", None)
    ids = torch.arange(4, 40)[None]
    expected, bias = logits(model, ids), model.lm_head.bias.detach().float()
    config = LoraConfig(target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]}, task_type="CAUSAL_LM")
    found = logits(get_peft_model(model, config), ids)
    torch.testing.assert_close(found + bias, expected, atol=0.05, rtol=0.02)  # bfloat16
    assert (found - expected).abs().max() > 0.1
