"""What the trainer takes of transformers' and trl's private names, held against the versions that pyproject.toml allows."""

import transformers
import trl
from packaging.requirements import Requirement
from packaging.version import Version

from qlora.planner import trace
from qlora.training.trainer import Trainer
from tests.test_layout import ROOT, tomllib

OVERRIDDEN = {
    "_clip_grad_norm",
    "_evaluate",
    "_get_train_sampler",
    "_init_training_state",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_rng_state",
    "_save_checkpoint",
}


def private(names):
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_the_private_names_that_are_overridden_exist_and_are_all_listed():
    """One that a library renames would never be called again, in silence."""
    ours = {name for name in private(vars(Trainer)) if hasattr(trl.SFTTrainer, name)}
    assert ours == OVERRIDDEN


def test_only_the_minor_versions_that_these_tests_run_with_are_allowed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    allowed = {Requirement(entry).name: Requirement(entry).specifier for entry in listed}
    for name, module in (("transformers", transformers), ("trl", trl)):
        major, minor, *_ = Version(module.__version__).release
        assert module.__version__ in allowed[name]
        assert f"{major}.{minor + 1}.0" not in allowed[name]
        assert f"{major}.{minor - 1}.9" not in allowed[name]


def test_the_planner_cuts_the_vocabulary_as_trl_does():
    from trl.trainer import utils

    assert trace.VOCAB_CHUNK_SIZE == utils._CHUNKED_LOGPROB_CHUNK_SIZE
