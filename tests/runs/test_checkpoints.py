"""A run that was stopped and resumed is the run that was never stopped, to the bit; and what is not whole is not used."""

import datetime
import json
import random
import re
import shutil
import signal
from pathlib import Path
from typing import get_args
from unittest import mock

import bitsandbytes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora import planner
from qlora.commands.train import train
from qlora.data import cache
from qlora.recipe import Recipe, Training
from qlora.runs import checkpoints, record
from qlora.runs.checkpoints import Checkpoints, Damaged
from qlora.runs.folder import RunDir
from qlora.system.errors import DoesNotFit, InputError, Interrupted, TrainingFailed
from qlora.training.master_weights import MasterWeights
from qlora.training.objectives.supervised import Trainer
from tests.conftest import messages, no_plan, some_slow, write_jsonl

pytestmark = pytest.mark.usefixtures("unplanned")

# the tiny model's layers have 32 to 128 numbers a side: 32 ranks make some of them large enough for 8-bit states
WIDE = {"lora_alpha": 32, "lora_dropout": 0.1}
NINE_ROWS_A_STEP = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3, "save_steps": None}


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path)


def write_rows(folder):
    """Return two files in `folder` with rows of uneven length, 40 in all."""
    files = []
    for name, numbers in (("a", range(25)), ("b", range(25, 40))):
        turns = [[("user", f"{n}?"), ("assistant", "ab " * (1 + n * 7 % 23))] for n in numbers]
        files.append(str(write_jsonl(folder / f"{name}.jsonl", [{"messages": messages(t)} for t in turns])))
    return files


@pytest.fixture
def recipe_of(make_recipe, rows, tmp_path):
    """Return recipe_of(name, lora={}, data={}, adalora=None, **training) -> a Recipe over several epochs of 40 rows.
    Its run is `name`."""

    def recipe_of(name, lora=None, data=None, adalora=None, **training):
        method = {"lora": {"r": 32, **WIDE, **(lora or {})}} if adalora is None else {"adalora": {**WIDE, **adalora}}
        defaults = {"max_steps": 9, **NINE_ROWS_A_STEP}
        if (data or {}).get("packing"):
            defaults |= {"per_device_train_batch_size": 1}
        return make_recipe(
            **method,
            data={"train": rows, "eval_fraction": 0.1, **(data or {})},
            training={**defaults, **training},
            output_dir=str(tmp_path / name),
        )

    return recipe_of


def stop_at(monkeypatch, step):
    """Send SIGTERM while `step` is computed (1, 2, ...)."""

    original = Trainer.training_step

    def stopped(self, *args, **kwargs):
        if self.state.global_step == step - 1 and self.saving.stop.number is None:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", stopped)
        yield


def stopped_and_resumed(monkeypatch, recipe, *steps):
    """Train `recipe`, stopped in each of `steps` and resumed; return the finished run."""
    for number, step in enumerate(steps):
        for _ in stop_at(monkeypatch, step):
            with pytest.raises(
                Interrupted, match=r"resume after step \d+ with:  qlora train .*/recipe.yaml --resume"
            ) as caught:
                train(recipe, resume=number > 0)
        assert caught.value.exit_code == 143
        assert (Path(recipe.output_dir) / "checkpoints" / f"step-{step}").is_dir()
    return train(recipe, resume=True)


MEASURED = ("time", "tokens_per_second", "memory_bytes")


def computed(run):
    """Return everything in metrics.jsonl that says what was computed."""
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in records]


def weights(run):
    return load_file(run.adapter / "adapter_model.safetensors")


def assert_same_run(one, other):
    assert computed(one) == computed(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


ADALORA = {"init_r": 32, "target_r": 20, "tinit": 1, "tfinal": 3}
LION = {"learning_rate": 1e-3, "optim": "paged_lion_8bit"}
LOGS = {"eval_steps": 2, "logging_steps": 3}
# an epoch has 4 steps of 9 of the 36 rows: 2 and 5 lie within one, 4 and 8 end one
CASES = {
    "8 bit, dropout": ({}, (2, 4)),
    "packing, NEFTune, weights": ({"data": {"packing": True, "max_length": 128}, "neftune_noise_alpha": 5.0,
                                   "gradient_accumulation_steps": 2}, (5,)),
    "rows of like length, evaluations": ({"group_by_length": True, **LOGS}, (5,)),
    "AdaLoRA": ({"adalora": ADALORA}, (1, 2)),  # before ranks shrink, and while
}  # fmt: skip
IN_CI = ("8 bit, dropout", "packing, NEFTune, weights")
MORE = {
    "torch, tokens in a micro-batch": ({"optim": "adamw_torch", "tokens_per_micro_batch": 128,
                                        "per_device_train_batch_size": 1, "warmup_ratio": 0.5}, (3,)),
    "lion, DoRA, no kernels": ({**LION, "lora": {"use_dora": True}, "kernels": "off"}, (6,)),
}  # fmt: skip
LONG = {
    **{name: (settings, range(1, 9)) for name, (settings, _) in (CASES | MORE).items()},
    **{optim: ({"optim": optim, "weight_decay": 0.1, "lr_scheduler_type": "linear"}, (2, 5)) for optim in
       ("adamw_8bit", "paged_adamw_32bit", "adamw_torch_fused", "paged_lion_32bit")},
}  # fmt: skip


@pytest.mark.parametrize("case", some_slow(CASES, but=IN_CI))
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(recipe_of, rows, monkeypatch, case):
    settings, steps = CASES[case]
    assert_resumed_equals_whole(recipe_of, rows, monkeypatch, settings | {"max_steps": 6}, steps)


def test_steps_that_are_not_taken_are_the_same_in_a_resumed_run(recipe_of, monkeypatch, capsys):

    original, trainers = Trainer.compute_loss, []

    def overflowing(self, model, *args, **kwargs):
        trainers.append(self)
        broken = model.training and self.state.global_step + 1 in (3, 6)
        return original(self, model, *args, **kwargs) * float("nan" if broken else 1)

    monkeypatch.setattr(Trainer, "compute_loss", overflowing)
    settings = {
        "adalora": ADALORA,
        "eval_steps": 2,
        "logging_steps": 4,
        "watchdog_steps": 4,
        "gradient_accumulation_steps": 1,
    }
    whole = train(recipe_of("whole", **settings))
    watched = trainers[-1].watch.state()
    (said,) = re.findall(r" loss (\d.*), held-out", capsys.readouterr().err)
    resumed = stopped_and_resumed(monkeypatch, recipe_of("resumed", **settings), 3)
    assert_same_run(whole, resumed)
    assert [record["step"] for record in computed(whole) if "not_taken" in record] == [3, 6]
    assert trainers[-1].watch.state() == watched
    assert re.findall(r" loss (\d.*), held-out", capsys.readouterr().err) == [said]


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG)
def test_the_same_stopped_in_every_step(recipe_of, rows, monkeypatch, case):
    assert_resumed_equals_whole(recipe_of, rows, monkeypatch, *LONG[case])


def assert_resumed_equals_whole(recipe_of, rows, monkeypatch, settings, steps):
    settings = dict(settings)
    kernels = settings.pop("kernels", "auto")
    if "neftune_noise_alpha" in settings:
        sources = [{"path": rows[0], "weight": 0.7}, {"path": rows[1], "weight": 1.5}]
        settings["data"] = {**settings["data"], "train": sources}
    whole, other = (recipe_of(name, **settings).model_copy(update={"kernels": kernels}) for name in ("whole", "other"))
    resumed = stopped_and_resumed(monkeypatch, other, *steps)
    assert_same_run(train(whole), resumed)


def test_another_seed_is_another_run(recipe_of):
    one, other = (train(recipe_of(name, seed=seed, max_steps=1)) for name, seed in (("one", 1), ("other", 2)))
    with pytest.raises(AssertionError):
        assert_same_run(one, other)


# ---- an optimizer by itself ------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw_8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2),
    "paged_adamw_8bit": lambda p: bitsandbytes.optim.PagedAdamW8bit(p, lr=1e-2),
    "paged_adamw_32bit": lambda p: bitsandbytes.optim.PagedAdamW32bit(p, lr=1e-2),
    "paged_lion_8bit": lambda p: bitsandbytes.optim.PagedLion8bit(p, lr=1e-3),
    "paged_lion_32bit": lambda p: bitsandbytes.optim.PagedLion32bit(p, lr=1e-3),
    "adamw_torch": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw_torch_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_goes_on_as_if_it_had_not_stopped(optim, tmp_path):
    assert set(OPTIMIZERS) == set(get_args(Training.model_fields["optim"].annotation))
    names = ["large", "small", "still"]  # 8-bit and 32-bit states, and a parameter that has had no gradient

    def begin():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64, 128), (7, 3), (5,))]
        return parameters, OPTIMIZERS[optim](parameters)

    def steps(parameters, optimizer, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            for parameter in parameters[:2]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    whole, optimizer = begin()
    steps(whole, optimizer, range(4))
    tensors, numbers = checkpoints.optimizer_state(optimizer, names)
    written = Checkpoints(tmp_path, "run").write(4, tensors, numbers, {})
    values = [parameter.detach().clone() for parameter in whole]
    steps(whole, optimizer, range(4, 8))

    resumed, optimizer = begin()
    for parameter, value in zip(resumed, values, strict=True):
        parameter.data = value
    tensors, numbers = checkpoints.read_tensors(written.path), checkpoints.read_state(written.path)
    checkpoints.restore_optimizer(optimizer, names, tensors, numbers)
    steps(resumed, optimizer, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))

    fresh, optimizer = begin()  # without the state it is another run
    for parameter, value in zip(fresh, values, strict=True):
        parameter.data = value
    steps(fresh, optimizer, range(4, 8))
    assert not torch.equal(whole[0], fresh[0])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_paged_states_are_asked_for_as_in_a_first_step(monkeypatch):
    asked = []
    original = bitsandbytes.optim.PagedAdamW8bit.get_state_buffer
    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "get_state_buffer",
                        lambda self, p, dtype: asked.append(original(self, p, dtype)) or asked[-1])  # fmt: skip
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    one, other = (bitsandbytes.optim.PagedAdamW8bit([parameter]) for _ in range(2))
    parameter.grad = torch.ones_like(parameter)
    one.step()
    checkpoints.restore_optimizer(other, ["p"], *checkpoints.optimizer_state(one, ["p"]))
    state = other.state[parameter]
    assert [state["state1"] is asked[2], state["state2"] is asked[3]] == [True, True]
    assert torch.equal(asked[2], asked[0])


def test_the_state_of_another_optimizer_is_refused():
    parameter = torch.nn.Parameter(torch.zeros(64, 128))
    one, other = torch.optim.AdamW([parameter]), bitsandbytes.optim.AdamW8bit([parameter])
    parameter.grad = torch.ones_like(parameter)
    for first, second in ((one, other), (other, one)):
        first.step()
        with pytest.raises(InputError, match="resume with the training"):
            checkpoints.restore_optimizer(second, ["p"], *checkpoints.optimizer_state(first, ["p"]))
        second.state.clear()


def test_random_numbers_go_on(tmp_path):
    def draw():
        return random.gauss(0, 1), float(np.random.standard_normal()), torch.rand(3).tolist()

    draw()  # Gaussian numbers come in pairs: the second of each waits in the state
    state = json.loads(json.dumps(checkpoints.random_state(torch.device("cpu"))))
    expected = [draw() for _ in range(3)]
    draw()
    checkpoints.restore_random_state(state, torch.device("cpu"))
    assert [draw() for _ in range(3)] == expected


# ---- whole or not there ----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path):
    """Three checkpoints of one run."""
    kept = Checkpoints(tmp_path / "run" / "checkpoints", "this")
    for step in (10, 20, 30):
        kept.write(step, {"weights/a": torch.full((3,), float(step))}, {"step": step}, {"global_step": step})
    return kept


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


FAULTS = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "emptied": lambda file: file.write_bytes(b""),
    "first bit flipped": lambda file: flip(file, 0),
    "a bit flipped": lambda file: flip(file, file.stat().st_size // 2),
    "deleted": lambda file: file.unlink(),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "text": lambda file: file.write_text("<!DOCTYPE html>"),
}
FILES = ["manifest.json", "state.json", "tensors.safetensors", "trainer_state.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_as_it_was_written_is_named_and_the_one_before_taken(kept, fault, file):
    assert kept.newest() == (kept.folder / "step-30", [])
    FAULTS[fault](kept.folder / "step-30" / file)
    path, (reason,) = kept.newest()
    assert path == kept.folder / "step-20"
    assert str(kept.folder / "step-30" / ("" if file == "manifest.json" else file)) in reason  # it lists the others
    kept.verify(path)
    with pytest.raises(Damaged):
        kept.verify(kept.folder / "step-30")


def test_every_bit_of_a_manifest_is_checked(kept):
    manifest = kept.folder / "step-30" / "manifest.json"
    whole = manifest.read_bytes()
    for at in range(len(whole)):
        flip(manifest, at)
        try:
            kept.verify(manifest.parent)
        except Damaged:
            pass
        else:  # only what JSON does not tell apart
            assert json.loads(manifest.read_bytes()) == json.loads(whole), at
        manifest.write_bytes(whole)


@pytest.mark.parametrize("file", FILES)
def test_files_of_two_runs_or_of_two_steps_do_not_make_a_checkpoint(kept, tmp_path, file):
    other = Checkpoints(tmp_path / "other", "another")
    other.write(30, {"weights/a": torch.full((3,), 7.0)}, {"step": 31}, {"global_step": 31})
    for source in (other.folder / "step-30", kept.folder / "step-20"):
        whole = (kept.folder / "step-30" / file).read_bytes()
        shutil.copy(source / file, kept.folder / "step-30" / file)
        assert kept.newest()[0] == kept.folder / "step-20"
        (kept.folder / "step-30" / file).write_bytes(whole)
    assert kept.newest()[0] == kept.folder / "step-30"


def test_a_whole_checkpoint_of_another_run_or_under_another_name_is_skipped(kept, tmp_path):
    other = Checkpoints(tmp_path / "other", "another")
    other.write(40, {}, {}, {})
    shutil.copytree(other.folder / "step-40", kept.folder / "step-40")
    shutil.copytree(kept.folder / "step-10", kept.folder / "step-50")
    path, reasons = kept.newest()
    assert path == kept.folder / "step-30"
    assert [reason.rpartition(": ")[2] for reason in reasons] == ["format 2, step 10", "belongs to another run"]


def test_rotation_removes_only_what_this_run_made_and_only_older_ones(kept, tmp_path):
    other = Checkpoints(tmp_path / "other", "another")
    other.write(5, {}, {}, {})
    shutil.copytree(other.folder / "step-5", kept.folder / "step-5")
    for name in ("step-mine", "step-15", "step-007x", "backup"):
        (kept.folder / name).mkdir()
        (kept.folder / name / "precious").write_text("x")
    kept.write(40, {}, {}, {}, limit=2)
    left = {path.name for path in kept.folder.iterdir()}
    assert left == {"step-5", "step-mine", "step-15", "step-007x", "backup", "step-30", "step-40"}


def test_a_step_whose_checkpoint_was_skipped_is_written_anew(kept):
    FAULTS["cut"](kept.folder / "step-30" / "state.json")  # can be told to be ours
    FAULTS["emptied"](kept.folder / "step-20" / "manifest.json")  # cannot
    for step in (20, 30):
        kept.write(step, {"weights/a": torch.zeros(1)}, {}, {})
    assert kept.newest() == (kept.folder / "step-30", [])
    assert sorted(path.name for path in kept.folder.iterdir()) == ["step-10", "step-20", "step-20.damaged-1", "step-30"]
    assert (kept.folder / "step-20.damaged-1" / "tensors.safetensors").exists()


def test_a_skipped_later_step_is_not_kept_in_the_place_of_the_new_one(kept):
    for step in (20, 30):
        FAULTS["cut"](kept.folder / f"step-{step}" / "state.json")
    kept.write(15, {}, {}, {}, limit=1)
    assert [path.name for path in kept.folder.iterdir()] == ["step-15"]


def test_when_the_new_one_does_not_verify_no_old_one_is_removed(kept, monkeypatch):
    original = checkpoints.save_file

    def broken(tensors, path):
        original(tensors, path)
        monkeypatch.setattr(checkpoints, "sha256", lambda file: next(hashes))

    hashes = iter("abcdefgh")
    monkeypatch.setattr(checkpoints, "save_file", broken)
    with pytest.raises(Damaged, match="content has changed"):
        kept.write(40, {"weights/a": torch.zeros(1)}, {}, {}, limit=1)
    monkeypatch.undo()
    for step in (10, 20, 30):
        kept.verify(kept.folder / f"step-{step}")


def test_only_plain_files_follow_the_umask_and_hold_no_pickle(kept):
    folder = kept.folder / "step-30"
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert len({path.stat().st_mode & 0o777 for path in folder.iterdir()}) == 1
    assert all(b"\x80\x04" not in path.read_bytes()[:2] for path in folder.iterdir())


# ---- the same run, or not --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_from_before_joined_steps_goes_on_as_it_was_begun(recipe_of, monkeypatch, capsys):
    by_rows = recipe_of("run", max_steps=4, tokens_per_micro_batch=None)
    for _ in stop_at(monkeypatch, 2):
        with pytest.raises(Interrupted):
            train(by_rows)
    with pytest.raises(InputError, match=r'training\.tokens_per_micro_batch: was null, is "auto"'):
        train(changed(by_rows, "training.tokens_per_micro_batch=auto"), resume=True)
    resumed = train(recipe_of("run", max_steps=4), resume=True)  # whose recipe does not say
    assert "the run has training.tokens_per_micro_batch: null, and goes on with that" in capsys.readouterr().err
    assert resumed.recipe().training.tokens_per_micro_batch is None
    assert_same_run(train(recipe_of("whole", max_steps=4, tokens_per_micro_batch=None)), resumed)


@pytest.fixture(scope="module")
def stopped_once(tiny_model, tmp_path_factory):
    """(A recipe whose run was stopped in step 2, a copy of its folder with rows and run.) Made once."""
    folder, monkeypatch = tmp_path_factory.mktemp("stopped") / "it", pytest.MonkeyPatch()
    folder.mkdir()
    monkeypatch.setattr(planner, "outline", no_plan)
    recipe = Recipe.from_dict({
        "model": {"name_or_path": str(tiny_model())},
        "lora": {"r": 32, **WIDE},
        "data": {"train": write_rows(folder), "max_length": 128, "eval_fraction": 0.1},
        "training": {**NINE_ROWS_A_STEP, "max_steps": 4, "learning_rate": 1e-2, "warmup_ratio": 0.0},
        "output_dir": str(folder / "run"),
    })  # fmt: skip
    for _ in stop_at(monkeypatch, 2):
        with pytest.raises(Interrupted):
            train(recipe)
    monkeypatch.undo()
    return recipe, shutil.copytree(folder, folder.with_name("kept"))


@pytest.fixture
def stopped(stopped_once):
    """A recipe whose run was stopped in step 2."""
    recipe, kept = stopped_once
    folder = Path(recipe.output_dir).parent
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)
    return recipe


def changed(recipe, *overrides):
    return Recipe.from_dict(recipe.model_dump(), overrides)


REFUSED = [
    ("training.learning_rate=1e-3", "training.learning_rate: was 0.01, is 0.001"),
    ("training.gradient_accumulation_steps=2", "training.gradient_accumulation_steps: was 3, is 2"),
    ("training.seed=7", "training.seed: was 42, is 7"),
    ("training.max_steps=3", "training.max_steps: was 4, is 3"),
    ("lora.lora_dropout=0.2", "lora.lora_dropout: was 0.1, is 0.2"),
    ("quantization.use_double_quant=false", "quantization.use_double_quant: was true, is false"),
    ("quantization=null", 'quantization.quant_type: was "nf4", is null'),
    ("data.packing=true", "data.packing: was false, is true"),
    ("data.chat_template=chatml", "chat_template: "),
    ("kernels=off", 'kernels: was "auto", is "off"'),
]


def test_a_change_of_the_recipe_is_refused_by_name(stopped):
    for override, field in REFUSED:
        with pytest.raises(InputError, match=re.escape(field)) as caught:
            train(changed(stopped, override), resume=True)
        assert f"--allow-change {field.partition(':')[0]}" in str(caught.value)
    assert RunDir(stopped.output_dir).recipe().training.max_steps == 4  # as it was


def test_a_change_that_is_allowed_takes_effect(stopped):
    recipe = changed(stopped, "training.learning_rate=1e-3", "training.lr_scheduler_type=constant")
    with pytest.raises(InputError, match="lr_scheduler_type"):
        train(recipe, resume=True, allow_change=["training.learning_rate"])
    run = train(recipe, True, ["training.learning_rate", "training.lr_scheduler_type"])
    rates = [record["learning_rate"] for record in computed(run) if "learning_rate" in record]
    assert rates[0] == 1e-2
    assert rates[2:] == [1e-3, 1e-3]
    assert run.recipe().training.learning_rate == 1e-3


def test_other_rows_another_base_tokenizer_or_template_are_refused(stopped, tmp_path, tiny_model):
    begun, rows = RunDir(stopped.output_dir).recipe(), [source.path for source in stopped.data.train]
    with open(rows[0], "a") as file:
        file.write(Path(rows[1]).read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"data: was .*, is .*"):
        train(stopped, resume=True)
    Path(rows[0]).write_text("".join(line + "\n" for line in Path(rows[0]).read_text().splitlines()[:-1]))

    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    elsewhere = changed(stopped, f"model.name_or_path={base}")
    template = base / "chat_template.jinja"
    whole = template.read_text()
    template.write_text(whole.replace("'\\n' + ", "") + "{# #}")
    with pytest.raises(InputError, match="chat_template: "):
        train(elsewhere, resume=True)
    template.write_text(whole)

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] *= -1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"base_model: (?s:.)*base_model\.quantized: "):
        train(elsewhere, resume=True)
    assert RunDir(stopped.output_dir).recipe() == begun  # what is refused has changed nothing
    shutil.copy(tiny_model("llama") / "model.safetensors", base)
    assert train(elsewhere, resume=True).adapter.is_dir()  # the same files in another place are the same base


def test_rows_that_a_template_writes_another_date_into_are_refused(recipe_of, tiny_model, tmp_path, monkeypatch):
    """As long and with the same words of users as on the first day, and yet other tokens."""
    base = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    template = base / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d') }}\n" + template.read_text())
    recipe = changed(recipe_of("dated", max_steps=3), f"model.name_or_path={base}")

    def on_day(day):
        monkeypatch.setenv("QLORA_CACHE", str(tmp_path / f"cache {day}"))  # one has the rows of the first day
        cache.folder.cache_clear()
        clock = mock.Mock(now=lambda: datetime.datetime(2026, 1, day))
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)

    on_day(11)
    for _ in stop_at(monkeypatch, 2):
        with pytest.raises(Interrupted):
            train(recipe)
    on_day(12)
    with pytest.raises(
        InputError, match=r"1 setting changed since .*\n  tokens: was .* does the chat template write the date"
    ):
        train(recipe, resume=True)
    on_day(11)
    assert train(recipe, resume=True).adapter.is_dir()


def test_what_cannot_be_continued_says_so_even_if_it_is_allowed(stopped):
    for override, expected in (
        ("lora.r=8", "has another adapter"),
        ("training.optim=adamw_torch", "resume with the training.optim of the run"),
    ):
        with pytest.raises(InputError, match=expected):
            train(changed(stopped, override), True, [override.partition("=")[0]])
    with pytest.raises(InputError, match=r"--allow-change training\.lr: no such field"):
        train(stopped, True, ["training.lr"])


@pytest.mark.slow
def test_settings_that_change_no_weight_may_change(stopped, recipe_of):
    overrides = ("training.logging_steps=2", "training.save_steps=1", "training.eval_steps=1", "export.dtype=float32",
                 "memory.gradient_checkpointing=true")  # fmt: skip
    run = train(changed(stopped, *overrides), resume=True)
    whole = train(recipe_of("whole", max_steps=4))
    assert all(torch.equal(tensor, weights(run)[name]) for name, tensor in weights(whole).items())


# ---- the run folder --------------------------------------------------------------------------------------------------


def test_without_resume_an_unfinished_run_is_refused_and_the_way_on_is_named(stopped, tmp_path):
    with pytest.raises(InputError, match=r"resume it with `qlora train .*run/recipe.yaml --resume`, remove it or set"):
        train(stopped)
    with pytest.raises(InputError, match="contains no run to resume; leave --resume out"):
        train(changed(stopped, f"output_dir={tmp_path / 'none'}"), resume=True)
    with pytest.raises(InputError, match="--allow-change is for --resume"):
        train(stopped, allow_change=["training.seed"])
    with pytest.raises(InputError, match=r"it has no adapter/; resume it with `qlora train .*recipe\.yaml --resume`"):
        RunDir.open(stopped.output_dir)
    shutil.rmtree(Path(stopped.output_dir) / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint to resume from; remove the folder"):
        train(stopped, resume=True)
    with pytest.raises(InputError, match="contains an unfinished run; remove it or set"):
        train(stopped)


def test_a_finished_run_of_some_steps_names_what_made_it_so_long(recipe_of, capsys):
    recipe = recipe_of("run", max_steps=1)
    train(recipe)
    train(changed(recipe, "training.max_steps=null", "training.num_train_epochs=9"), resume=True)
    assert "is finished: 1 steps; set a higher training.max_steps," in capsys.readouterr().err
    with pytest.raises(
        InputError, match="contains a finished run, which is never overwritten; remove it or set output_dir="
    ):
        train(recipe)


AN_EPOCH = {"max_steps": None, "num_train_epochs": 1.0, "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 9, "gradient_accumulation_steps": 1}  # fmt: skip


def test_a_finished_run_says_so_and_can_be_made_longer(recipe_of, capsys):
    recipe = recipe_of("run", **AN_EPOCH, save_steps=100)
    run = train(recipe)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != "lock"}
    first = weights(run)
    assert train(recipe, resume=True).path == run.path
    assert "is finished: 4 steps; set a higher training.num_train_epochs," in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.name != "lock"}

    longer = train(changed(recipe, "training.num_train_epochs=2.0"), resume=True)
    whole = train(changed(recipe, "training.num_train_epochs=2.0", f"output_dir={run.path}-whole"))
    assert all(torch.equal(tensor, weights(longer)[name]) for name, tensor in weights(whole).items())
    kept = load_file(run.path / "adapter-step-4" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in first.items())
    assert longer.recipe().training.num_train_epochs == 2


WHY = ["an optimizer that is not restored", "out of memory in the rehearsal", "in the way"]


@pytest.mark.parametrize("why", some_slow(WHY, but=["in the way"]))
def test_a_finished_run_that_cannot_go_on_is_left_as_it_was(recipe_of, monkeypatch, why):
    recipe = recipe_of("run", **AN_EPOCH, save_steps=2)
    run = train(recipe)
    longer, allowed = changed(recipe, "training.num_train_epochs=2.0"), ()
    if why.startswith("an optimizer"):
        longer = changed(longer, "training.optim=adamw_torch")
        allowed, expected = ["training.optim"], InputError
    elif why == "in the way":
        (run.path / "adapter-step-4").mkdir()
        expected = InputError
    else:
        expected = DoesNotFit
        monkeypatch.setattr(Trainer, "rehearse", refuse_memory)
    before = contents(run.path)
    with pytest.raises(expected):
        train(longer, resume=True, allow_change=allowed)
    assert contents(run.path) == before
    monkeypatch.undo()
    if why.startswith("out of memory"):
        assert record.read(train(longer, resume=True))[-1].step == 8


def refuse_memory(trainer, largest):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != "lock"
    }


def test_ranks_that_shrink_by_the_number_of_steps_do_not_get_more_of_them(recipe_of, monkeypatch):
    recipe = recipe_of("run", adalora=ADALORA)
    for _ in stop_at(monkeypatch, 2):
        with pytest.raises(Interrupted):
            train(recipe)
    with pytest.raises(InputError, match=r"training\.max_steps: was 9, is 12"):
        train(changed(recipe, "training.max_steps=12"), resume=True)


def test_saves_every_so_many_steps_and_at_the_end_and_says_what_they_cost(recipe_of, capsys):
    run = train(recipe_of("run", save_steps=2, save_total_limit=3, gradient_accumulation_steps=1))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-6", "step-8", "step-9"]
    said = re.findall(r"step (\d)  checkpoint of ([\d.]+) KiB in [\d.]+s, [\d.]+% of the time", capsys.readouterr().err)
    assert [step for step, _ in said] == ["2", "4", "6", "8", "9"]
    size = sum(file.stat().st_size for file in (run.checkpoints / "step-9").iterdir())
    assert float(said[-1][1]) == pytest.approx(size / 2**10, abs=0.51)
    assert not [path for path in run.checkpoints.rglob("*") if "token" in path.name or path.suffix in (".bin", ".pt")]


def test_no_saving_changes_a_number(recipe_of):
    one, other = train(recipe_of("one", save_steps=1, max_steps=3)), train(recipe_of("other", max_steps=3))
    assert not other.checkpoints.exists()
    assert_same_run(one, other)


def test_numbers_that_are_not_finite_never_reach_a_checkpoint(recipe_of, monkeypatch, tmp_path):

    original = MasterWeights.clear_gradients

    calls = iter(range(99))

    def poison(self):
        original(self)
        if next(calls) == 4:
            self.masters[0].data[0, 0] = float("nan")

    monkeypatch.setattr(MasterWeights, "clear_gradients", poison)
    with pytest.raises(TrainingFailed, match=r"weights/.* contains non-finite values after step 5"):
        train(recipe_of("run", save_steps=1, gradient_accumulation_steps=1))
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-3", "step-4"]


def stopped_in_evaluations(monkeypatch, recipe, *places):
    """Train a recipe, stopped before these rows of its evaluations, each counted from where it was resumed; return the run."""
    original = Trainer.prediction_step
    for number, at in enumerate(places):
        calls = iter(range(99))

        def stopping(self, *args, calls=calls, at=at, **kwargs):
            if next(calls) == at:
                signal.raise_signal(signal.SIGINT)
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "prediction_step", stopping)
            with pytest.raises(Interrupted) as caught:
                train(recipe, resume=number > 0)
        assert caught.value.exit_code == 130
    return train(recipe, resume=True)


def test_an_evaluation_that_is_left_is_made_up_for(recipe_of, monkeypatch):

    settings = {"eval_steps": 3, "max_steps": 6, "gradient_accumulation_steps": 1, "per_device_eval_batch_size": 1}
    whole, recipe = train(recipe_of("whole", **settings)), recipe_of("other", **settings)
    # 4 rows each: in the evaluation after step 3; in that after step 6, when the other was made up for
    assert_same_run(whole, stopped_in_evaluations(monkeypatch, recipe, 1, 6))
