"""What the trainer takes of private names is in one file, and is there in the installed versions, which alone are allowed."""

import inspect
import re

import accelerate
import pytest
import torch
import transformers
import trl
from packaging.requirements import Requirement
from packaging.version import Version

import qlora.training
from qlora.training import private_names
from qlora.training.private_names import Hooks
from qlora.training.reliable_trainer import Reliable
from tests.test_layout import PACKAGE, ROOT, tomllib

# a method of transformers' Trainer that is overridden: its parameters, as it is called
OVERRIDDEN = {
    "_clip_grad_norm": ["model"],
    "_get_train_sampler": ["train_dataset"],
    "_init_training_state": ["max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_load_rng_state": ["checkpoint"],
    "_run_epoch": ["model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
                   "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
                   "steps_trained_in_current_epoch"],
    "_save_checkpoint": ["model", "trial"],
}  # fmt: skip
# what is put before a Trainer class, its hooks apart
PART = [kind for kind in Reliable.__mro__ if kind.__module__.startswith("qlora.") and kind is not Hooks]
SUMS = {"_globalstep_last_logged", "_initial_global_step", "_total_loss_scalar", "_tr_loss"}


def private(names):
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_the_private_methods_that_are_overridden_are_there_with_these_parameters():
    """One that a library renames would never be called again, in silence."""
    assert private(vars(Hooks)) == OVERRIDDEN.keys()
    for name, parameters in OVERRIDDEN.items():
        original = getattr(transformers.Trainer, name)
        assert list(inspect.signature(original).parameters)[1:] == parameters, name


def test_the_loop_calls_them():
    source = inspect.getsource(transformers.Trainer)
    for name in OVERRIDDEN:
        assert re.search(rf"self\.{name}\b", source), name


def test_the_sums_that_are_read_are_those_of_the_loop():
    source = inspect.getsource(transformers.Trainer._inner_training_loop)
    source += inspect.getsource(transformers.Trainer._finalize_training)
    for name in SUMS:
        assert f"self.{name}" in source, name
    assert "_n_gpu" in inspect.getsource(transformers.TrainingArguments)


def test_trls_trainers_have_these_counters():
    for trainer in (trl.SFTTrainer, trl.DPOTrainer):
        source = inspect.getsource(trainer)
        for name in private_names.TRL_COUNTERS:
            assert f"self.{name} = " in source, name


def test_a_schedule_is_set_to_a_step_as_if_all_before_had_been_taken():
    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1)), optimizer

    (one, first), (other, second) = made(), made()
    for _ in range(5):
        first.step()
        one.step()
    private_names.set_rates(other, 5, second)
    assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]
    assert other.get_last_lr() == one.get_last_lr()
    assert other.state_dict()["last_epoch"] == one.state_dict()["last_epoch"]


def test_no_other_file_of_training_uses_a_private_name_of_somebody_else():
    own = private(name for kind in PART for name in vars(kind))
    for path in (PACKAGE / "training").rglob("*.py"):
        if path.name == "private_names.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"(?<!self)\.(_[a-z]\w*)", text), path
        if path.name in {"reliable_trainer.py", "evaluating.py"}:
            assert set(re.findall(r"self\.(_[a-z]\w*)", text)) <= own


@pytest.mark.parametrize("trainer", [transformers.Trainer, trl.SFTTrainer, trl.DPOTrainer])
def test_what_the_part_adds_has_no_name_that_a_trainer_has(trainer):
    """But for what it overrides on purpose: the documented methods."""
    public = {"compute_loss", "create_optimizer", "create_scheduler", "evaluate", "evaluation_loop", "log", "prediction_step",
              "training_step"}  # fmt: skip
    names = {name for kind in (*PART, Hooks) for name in vars(kind) if not name.startswith("__")}
    assert names & set(dir(trainer)) == public | OVERRIDDEN.keys()


def test_only_the_minor_versions_that_these_tests_run_with_are_allowed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {Requirement(entry).name: Requirement(entry).specifier for entry in listed}
    for name, module in (("transformers", transformers), ("trl", trl)):
        major, minor, *_ = Version(module.__version__).release
        assert module.__version__ in allowed[name]
        assert f"{major}.{minor + 1}.0" not in allowed[name]
        assert f"{major}.{minor - 1}.9" not in allowed[name]
    assert accelerate.__version__ in allowed["accelerate"]


def test_training_takes_few_arguments():
    assert len(inspect.signature(qlora.training.train).parameters) <= 6
