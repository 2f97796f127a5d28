"""Files of other tools: each of their fields is carried over or named, and what is written is a recipe."""

import json

import pytest

from qlora.commands.init import migrate
from qlora.recipe import Recipe, migration
from qlora.recipe.commented import Line, as_text, values_of
from qlora.recipe.yaml_document import parse
from qlora.system.errors import InputError

AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
datasets:
  - {path: tatsu-lab/alpaca, type: alpaca, shards: 10}
  - {path: json, data_files: mine.jsonl, type: {field_instruction: q, field_output: a, format: "Q: {instruction}"}}
dataset_prepared_path:
val_set_size: 0.05
adapter: qlora
sequence_len: 4096
sample_packing: yes
lora_r: 32
lora_alpha: 16
lora_target_linear: true
wandb_project: mine
micro_batch_size: 2
num_epochs: 4
optimizer: adopt_adamw
lr_scheduler: cosine
learning_rate: 2e-4
group_by_length: true
bf16: auto
gradient_checkpointing: offload
warmup_steps: 10
max_steps: 100
hub_token: hunter2hunter2
special_tokens: {pad_token: "<|end_of_text|>"}
"""
LLAMA_FACTORY = """
model_name_or_path: Qwen/Qwen3-4B
quantization_bit: 4
stage: sft
finetuning_type: lora
lora_rank: 12
lora_target: q_proj,v_proj
dataset: mine,missing
template: qwen3
cutoff_len: 1024
max_samples: 1000
warmup_steps: 100
val_size: 200
report_to: none
galore_rank: 4
"""


def written(tmp_path, text):
    (tmp_path / "theirs.yml").write_text(text)
    found = migrate(tmp_path / "theirs.yml", tmp_path / "ours.yaml")
    return found, Recipe.load(tmp_path / "ours.yaml"), (tmp_path / "ours.yaml").read_text()


def test_every_field_of_axolotl_is_carried_over_or_named(tmp_path):
    found, recipe, text = written(tmp_path, AXOLOTL)
    fates = {*found["carried"], *found["not_needed"], *found["no_counterpart"], *found["unset"]}
    assert parse(AXOLOTL, "")[0].keys() <= fates
    assert {"datasets[0].shards", "datasets[1].type.format", "optimizer", "hub_token"} <= found["no_counterpart"].keys()
    assert all(name in text for name in fates - {"adapter"})
    assert (recipe.quantization.quant_type, recipe.lora.r, recipe.lora.lora_alpha) == ("nf4", 32, 16)
    assert recipe.data.train[0].name == "tatsu-lab/alpaca"
    assert (recipe.data.train[1].path, recipe.data.train[1].columns) == (
        "mine.jsonl",
        {"instruction": "q", "output": "a"},
    )
    assert (recipe.data.packing, recipe.data.max_length, recipe.data.overlong) == (True, 4096, "drop")
    assert (recipe.training.gradient_accumulation_steps, recipe.training.per_device_train_batch_size) == (1, 2)
    assert (recipe.training.warmup_ratio, recipe.training.learning_rate) == (0.1, 2e-4)
    assert (recipe.memory.gradient_checkpointing, recipe.memory.offload) == (True, True)
    assert "hunter2" not in text + str(found)


def test_every_field_of_llama_factory_is_carried_over_or_named(tmp_path):
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": {"file_name": "m.json", "columns": {"prompt": "q"}}})
    )
    found, recipe, _ = written(tmp_path, LLAMA_FACTORY)
    fates = {*found["carried"], *found["not_needed"], *found["no_counterpart"], *found["unset"]}
    assert parse(LLAMA_FACTORY, "")[0].keys() <= fates
    assert {"val_size", "warmup_steps", "galore_rank", "dataset missing"} <= found["no_counterpart"].keys()
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.target_modules) == (12, 24, ["q_proj", "v_proj"])
    assert recipe.data.train[0].path == str(tmp_path / "m.json")
    assert recipe.data.train[0].columns == {"instruction": "q", "output": "output"}
    assert [source.max_rows for source in recipe.data.train] == [1000, 1000]
    # transformers' and LLaMA-Factory's defaults, not ours
    training = recipe.training
    assert (training.num_train_epochs, training.learning_rate, training.lr_scheduler_type) == (3, 5e-5, "linear")
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (8, 1)
    assert recipe.data.overlong == "truncate"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base_model: x\nrl: dpo\n", "rl: dpo: only supervised"),
        ("base_model: x\nadapter: llama-adapter\n", "adapter: llama-adapter"),
        ("model_name_or_path: x\nstage: ppo\n", "stage: ppo: only supervised"),
        ("model_name_or_path: x\nstage: sft\nfinetuning_type: freeze\n", "finetuning_type: freeze"),
        ("model_name_or_path: x\nstage: sft\nlora_rank: many\n", "a value cannot be read"),
        ("model: {name_or_path: x}\n", "a recipe of qlora already"),
        ("learning_rate: 1\n", "neither a file of axolotl"),
        ("- 1\n", "one YAML mapping"),
        ("base_model: x\nadapter: lora\nlora_r: 0\ndatasets: [{path: a.json}]\n", "lora.r"),
        ("base_model: x\nadapter: lora\n", "data"),
    ],
)
def test_what_cannot_be_carried_over_is_refused_and_nothing_written(tmp_path, text, said):
    (tmp_path / "theirs.yml").write_text(text)
    with pytest.raises(InputError, match=said):
        migrate(tmp_path / "theirs.yml", tmp_path / "ours.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.yml"]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="no file at"):
        migration.read(tmp_path / "none.yml")


def test_commented_lines_read_back_to_their_values():
    lines = [
        Line("output_dir", "runs/a b: #1", "two\nlines"),
        Line("data.train", [{"name": "one/pair"}, {"path": "[x], {y}"}], "a list"),
        Line("data.columns", {"text": "a: b"}),
        Line("data.chat_template", "yes"),
        Line("training.learning_rate", 2e-4),
        Line("quantization", None, "null"),
        Line("full", {}),
    ]
    text = as_text(["header\u2028- x: 1"], lines, ["footer\ny: 2"])
    assert parse(text, "text")[0] == values_of(lines)
    assert text.index("quantization") < text.index("data:") < text.index("output_dir")
