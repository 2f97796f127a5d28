"""Several processes are for training, by launchers that say all of it; a launcher around one process changes nothing."""

import os
import re

import pytest

from qlora import evaluate, export, push, train
from qlora.system import launched
from qlora.system.errors import InputError
from tests import forked

TORCHRUN = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize("name", launched.COUNTS)
def test_two_processes_are_refused_before_anything_is_read(tmp_path, name):
    done = forked.run("train", "none.yaml", cwd=tmp_path, environ={**os.environ, name: "2"})
    assert done.returncode == 2
    assert done.stderr.startswith("qlora: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", launched.COUNTS)
def test_processes_of_another_launcher_are_refused_with_what_is_missing(make_recipe, monkeypatch, name):
    monkeypatch.setenv(name, "2")
    with pytest.raises(InputError, match=rf"\({name}=2\), but RANK, .*MASTER_PORT are not set; .*torchrun"):
        train(make_recipe())


def test_sharding_is_refused_by_name(monkeypatch):
    names = {**TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1", "ACCELERATE_USE_FSDP": "true"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="FSDP is not supported"):
        launched.to_train()
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert launched.to_train() == launched.Launched(0, 2, 0, 2)


def test_every_other_verb_that_writes_refuses_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for verb in (
        lambda: evaluate("none"),
        lambda: export("none", tmp_path / "out"),
        lambda: push("none", "me/mine"),
    ):
        with pytest.raises(InputError, match=r"several processes .*WORLD_SIZE=2.*\n  .*unset WORLD_SIZE"):
            verb()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["1", "0", "", "-2", "two", "2.0", "٢", " 1 "])
def test_one_process_or_no_number_is_not_several(monkeypatch, value):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert launched.several() is None


def test_a_batch_script_of_slurm_is_one_process_whatever_its_job_asked_for(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launched.several() is None


def test_a_launcher_around_one_process_changes_nothing(make_recipe, tmp_path, monkeypatch):
    alone = train(make_recipe(output_dir=str(tmp_path / "alone"))).metrics_file.read_text()
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1", "ACCELERATE_USE_FSDP": "true"}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    torchrun = train(make_recipe(output_dir=str(tmp_path / "torchrun"))).metrics_file.read_text()
    assert _losses(torchrun) == _losses(alone) != []
    assert {name: os.environ.get(name) for name in before} == before


def _losses(text):
    return re.findall(r'"loss": [\d.e-]+', text)
