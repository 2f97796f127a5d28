"""qlora plan as a user has it: what it prints and returns, exit codes, the plot; no weights, no GPU, data where there is some."""

import json

import pytest
import torch

from qlora import methods
from qlora.commands.data import inspect_data
from qlora.commands.plan import plan, plan_methods, plan_processes
from qlora.commands.train import train
from qlora.jobs.opening.prepared_data import prepare
from qlora.jobs.planning import method_plans, plan_job, planned_training
from qlora.recipe import Recipe
from qlora.runs import record
from qlora.system.errors import InputError
from tests import forked
from tests.faults.test_surroundings import AROUND

CONTRACT = {
    "components",
    "peak_bytes",
    "budget_bytes",
    "fits",
    "checkpointed_layers",
    "tokens_per_second",
    "suggestions",
}
COMPONENTS = [
    "weights",
    "adapter",
    "gradients",
    "optimizer",
    "checkpoints",
    "layer_work",
    "loss_head",
    "buffers",
    "context",
]


def test_json_has_the_keys_of_the_contract_and_needs_no_weights(recipe_file, tiny_model, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for file in tiny_model().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    done = forked.run("plan", recipe_file, f"model.name_or_path={folder}", "--json", "--card", "4090")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() >= CONTRACT
    assert list(found["components"]) == COMPONENTS
    assert sum(found["components"].values()) == found["peak_bytes"]
    assert found["budget_bytes"] == int(23.5 * 2**30)
    assert found["steps"] == 2  # max_steps
    assert found["limits"]["max_length"] > 128


def test_what_does_not_fit_exits_3_and_says_what_would(recipe_file):
    settings = ("memory.gradient_checkpointing=false", "training.tokens_per_micro_batch=null")
    done = forked.run("plan", recipe_file, *settings, "--vram", "550MiB")
    assert done.returncode == 0, done.stdout + done.stderr
    done = forked.run("plan", recipe_file, *settings, "--vram", "512.5MiB")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert "try       " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--vram", "24"], "--vram '24': give a size such as 5GB or 23.5GiB"),
        (["memory.budget=lots"], "memory.budget: give a size such as 5GB or 23.5GiB"),
        (["--card", "4091"], "--card '4091': unknown card; known are RTX 2080 Ti"),
        (["--plot", "memory.doc"], "--plot memory.doc: give a file that ends in .png or .svg"),
    ],
)
def test_wrong_sizes_cards_and_files_exit_2(recipe_file, arguments, expected):
    done = forked.run("plan", recipe_file, *arguments)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_the_budget_is_the_option_then_the_recipe_then_what_is_there(make_recipe, monkeypatch):
    def budget(recipe, **options):
        return plan(recipe, **options)["budget_bytes"]

    recipe = make_recipe(memory={"budget": "8GiB"})
    assert budget(recipe, vram="23.5GiB", card="3090") == int(23.5 * 2**30)
    assert budget(recipe, card="3090") == 8 * 2**30
    assert budget(make_recipe(), card="5090") == int(31.36 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 24 * 2**30))
    assert budget(make_recipe()) == 10 * 2**30 + 512 * 2**20  # what is free, and the context that the plan counts


def test_a_plan_for_the_cpu_is_that_of_a_training_on_it(make_recipe, monkeypatch, capsys):
    free = 3 * 2**30
    monkeypatch.setattr(plan_job.memory, "available_bytes", lambda device: free)
    recipe = make_recipe()
    found = plan(recipe, card="cpu")
    trained = planned_training.plan_training(prepare(recipe), torch.device("cpu")).plan
    assert (found["budget_bytes"], found["peak_bytes"]) == (free, trained.peak_bytes)
    assert found["tokens_per_second"] is None
    assert "3.00 GiB (free memory of this machine, without a GPU)" in capsys.readouterr().err
    assert plan(recipe, card="4090")["peak_bytes"] != found["peak_bytes"]
    assert plan(recipe, vram="1GiB", card="cpu")["budget_bytes"] == 2**30
    lora = next(one for one in plan_methods(recipe, card="cpu")["methods"] if one["method"] == "lora")
    assert lora["peak_bytes"] == found["peak_bytes"]
    with pytest.raises(InputError, match="--processes plans several GPUs"):
        plan_processes(recipe, 2, card="cpu")


def test_without_a_gpu_it_is_said_which_card_is_assumed_and_how_to_plan_for_the_cpu(make_recipe, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan(make_recipe())
    said = capsys.readouterr().err
    assert "no GPU found, so an RTX 4090 is assumed" in said
    assert "--card cpu" in said


def test_rows_are_never_said_to_fit_beyond_the_positions_of_the_model(make_recipe, capsys):
    recipe = make_recipe()
    assert plan(recipe, "24GiB")["limits"]["max_length"] == 512  # max_position_embeddings of the tiny model
    assert "rows up to 512 tokens (the model has no more positions)" in capsys.readouterr().out
    values = recipe.model_dump() | {"lora": None, "prompt_tuning": {"num_virtual_tokens": 12}}
    assert plan(Recipe.from_dict(values), "24GiB")["limits"]["max_length"] == 500


@pytest.mark.parametrize("around", ["bfloat16 as the default", "another default device", "inference mode"])
def test_what_a_program_has_set_of_torch_changes_no_plan(make_recipe, around):
    recipe = make_recipe()
    usual, rows = plan(recipe, "24GiB"), inspect_data(recipe)
    with AROUND[around]():
        found = Recipe.from_dict(recipe.model_dump() | {"output_dir": "other"})
        assert (plan(found, "24GiB"), inspect_data(found)) == (usual, rows)


@pytest.mark.parametrize(
    ("epochs", "said"), [(1.0, None), (1.5, "steps     8, 1.6 epochs"), (0.01, "steps     1, 0.2 epochs")]
)
def test_part_of_an_epoch_is_rounded_up_to_steps_in_plan_and_training(make_recipe, capsys, epochs, said):
    recipe = make_recipe(training={"num_train_epochs": epochs, "max_steps": None})
    run = train(recipe)
    steps = record.read(run)[-1].step
    told = capsys.readouterr().err
    assert (said in told) if said else ("rounded up" not in told)
    assert steps == {1.0: 5, 1.5: 8, 0.01: 1}[epochs]
    assert plan(recipe, "24GiB")["steps"] == steps


def test_what_the_list_of_cards_would_leave_out_is_refused(recipe_file):
    done = forked.run("plan", recipe_file, "--card", "list", "--methods")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--card list prints the cards and plans nothing; leave all else out" in done.stderr


def test_the_cards_are_listed_without_a_recipe():
    done = forked.run("plan", "--card", "list", "--json")
    assert done.returncode == 0
    found = {card["name"]: card for card in json.loads(done.stdout)["cards"]}
    assert found["RTX 4090"]["memory_bytes"] == int(23.5 * 2**30)
    assert not found["T4"]["bfloat16"]
    done = forked.run("plan", "--card", "list")
    assert "RTX 4060 Ti 16GB" in done.stdout
    done = forked.run("plan")
    assert done.returncode == 2
    assert "qlora plan needs a recipe" in done.stderr


def test_without_data_rows_of_max_length_are_planned_for(make_recipe, capsys):
    values = make_recipe().model_dump()
    values["data"]["train"] = "none.jsonl"
    values["data"]["eval_fraction"] = 0.0
    found = plan(Recipe.from_dict(values))
    assert "no file at none.jsonl: assuming rows of data.max_length tokens" in capsys.readouterr().err
    assert found["peak_bytes"] > plan(make_recipe())["peak_bytes"]  # whose rows are shorter than 128 tokens


def test_packed_padded_and_token_sized_micro_batches_are_planned_for(make_recipe):
    packed = make_recipe(data={"packing": True}, training={"per_device_train_batch_size": 1})
    assert plan(packed)["checkpointed_layers"] == 0
    sized = make_recipe(training={"per_device_train_batch_size": 1, "tokens_per_micro_batch": 512})
    assert plan(sized)["peak_bytes"] > plan(make_recipe(training={"per_device_train_batch_size": 1}))["peak_bytes"]


def test_the_plot_is_a_small_picture(make_recipe, tmp_path):
    pytest.importorskip("matplotlib")
    plan(make_recipe(), plot=str(tmp_path / "memory.png"))
    content = (tmp_path / "memory.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    assert 5_000 < len(content) < 200_000


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_plot_is_drawn_anew_but_not_over_what_another_program_has_made(make_recipe, tmp_path, ending):
    figure, pyplot = pytest.importorskip("matplotlib.figure"), pytest.importorskip("matplotlib.pyplot")
    mine, foreign = tmp_path / f"memory{ending}", tmp_path / f"photo{ending}"
    figure.Figure().savefig(foreign)
    before = foreign.read_bytes()
    with pytest.raises(InputError, match=f"--plot: .*photo.*{ending} is there and was not written by qlora plan"):
        plan(make_recipe(), plot=str(foreign))
    assert foreign.read_bytes() == before
    for _ in range(2):
        plan(make_recipe(), plot=str(mine))
    assert not pyplot.get_fignums()


def test_a_plot_without_matplotlib_says_what_to_install(make_recipe, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install .*matplotlib"):
        plan(make_recipe(), plot="memory.png")


def test_each_method_is_planned_and_what_to_take_is_said_with_numbers(make_recipe, capsys):
    recipe = make_recipe(lora={"r": 4})
    found = plan_methods(recipe, "24GiB")
    by_name = {one["method"]: one for one in found["methods"]}
    assert next(iter(by_name)) == "lora"
    assert by_name.keys() == {*methods.names(), "lora: {use_dora: true}", "lora, 16-bit base"}
    assert all(one["fits"] for one in by_name.values()), by_name
    alone = plan(recipe, "24GiB")
    assert by_name["lora"]["peak_bytes"] == alone["peak_bytes"]
    assert by_name["lora"]["trainable_parameters"] == 8192
    assert by_name["full"]["trainable_parameters"] > 100_000  # all weights
    assert by_name["full"]["peak_bytes"] > by_name["lora"]["peak_bytes"]
    assert any("139,584 numbers to learn with, and 18 rows" in line for line in found["advice"]), found["advice"]
    assert "speed at most" in capsys.readouterr().out


def test_a_method_that_a_recipe_does_not_let_be_says_so(make_recipe):
    by_name = method_plans.method_recipes(make_recipe(data={"packing": True}))
    assert "data.packing joins rows" in by_name["prompt_tuning"]
    assert isinstance(by_name["lora"], Recipe)


def test_where_no_method_fits_the_command_exits_3(make_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(make_recipe(lora={"r": 4}).to_yaml())
    done = forked.run("plan", path, "--methods", "--vram", "100MiB")
    assert done.returncode == 3
    assert "No method fits" in done.stdout
    assert forked.run("plan", path, "--methods", "--plot", tmp_path / "x.png").returncode == 2
