"""Several machines: launch lines that torchrun takes, what they must share, the SLURM script; machines are folders here."""

import os
import re
import shlex
import subprocess

import pytest
from torch.distributed import TCPStore
from torch.distributed.run import get_args_parser

from tests import forked
from tests.test_layout import ROOT
from tests.training.test_processes import FLOAT32, STEPS, surroundings, written

SCRIPT = ROOT / "scripts" / "slurm.sh"


def launch_lines():
    files = [ROOT / "docs" / "several_cards.md", *(ROOT / "recipes").rglob("*.yaml")]
    found = [
        line for file in files for line in re.findall(r"^#? +(torchrun .*)$", file.read_text(), flags=re.MULTILINE)
    ]
    assert len(found) >= 5
    return found


def test_torchrun_takes_the_launch_lines_of_the_documents():
    for line in launch_lines():
        asked = get_args_parser().parse_args(shlex.split(line)[1:])
        assert (asked.module, asked.training_script) == (True, "qlora"), line
        assert asked.training_script_args[0] == "train", line


def started(recipe_file, places, port, runs):
    """Return the two processes of a training, each as on a machine of its own: one process there, a cache and a run folder."""
    processes = []
    for rank, (place, run) in enumerate(zip(places, runs, strict=True)):
        environ = surroundings(2, rank, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        environ |= {"QLORA_CACHE": str(place / "cache")}
        processes.append(forked.Process("train", recipe_file, f"output_dir={run}", environ=environ))
    return processes


def finished(processes):
    found = []
    for process in processes:
        out, err = process.communicate(120)
        found.append((process.returncode, out, err))
        process.end()
    return found


def test_a_machine_that_does_not_see_the_run_folder_is_refused_at_once(make_recipe, tmp_path):
    file, _ = written(make_recipe(training=STEPS, quantization=FLOAT32), tmp_path, "any")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [tmp_path / "a", tmp_path / "b"]
    first, second = finished(started(file, places, store.port, [place / "run" for place in places]))
    assert first[0] != 0
    assert second[0] == 2
    assert "process 1 of 2 does not see the run folder" in second[2]
    assert "set an output_dir that all machines share" in second[2]
    assert "Traceback" not in first[2] + second[2]


@pytest.mark.slow
def test_machines_need_not_share_a_cache(make_recipe, tmp_path):
    file, run = written(make_recipe(training=STEPS, quantization=FLOAT32), tmp_path, "run")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    places = [tmp_path / "a", tmp_path / "b"]
    assert [code for code, *_ in finished(started(file, places, store.port, [run.path] * 2))] == [0, 0]
    assert all(any((place / "cache" / "tokenized").iterdir()) for place in places)
    assert run.adapter.is_dir()


@pytest.mark.parametrize("ran_before", [False, True])
def test_the_slurm_script_starts_torchrun_on_each_machine(tmp_path, ran_before):
    """With an srun that runs the command once, as node 1 of 2, and a torchrun that prints what it was given."""
    programs = {"srun": '#!/bin/bash\n[ "$1" = --kill-on-bad-exit=1 ] && shift\nSLURM_NODEID=1 exec "$@"\n',
                "scontrol": '#!/bin/bash\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n',
                "torchrun": '#!/bin/bash\nprintf "%s\\n" "$@"\n'}  # fmt: skip
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "a run"
    if ran_before:
        run.mkdir()
        (run / "recipe.yaml").write_text("")
    slurm = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "12345", "SLURM_GPUS_PER_NODE": "4"}
    environ = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", SCRIPT, "mine.yaml", run, "lora.r=8"], env=environ, capture_output=True, text=True, check=True
    )
    asked = get_args_parser().parse_args(done.stdout.splitlines())
    assert (asked.nnodes, asked.node_rank, asked.nproc_per_node) == ("2", 1, "4")
    assert (asked.master_addr, asked.master_port) == ("n1", 22345)
    expected = ["train", "mine.yaml", f"output_dir={run}", "lora.r=8", *(["--resume"] if ran_before else [])]
    assert asked.training_script_args == expected
    without = environ | {"SLURM_JOB_NODELIST": "unknown"}
    failed = subprocess.run(
        ["bash", SCRIPT, "mine.yaml", run], env=without, capture_output=True, text=True, check=False
    )
    assert failed.returncode != 0
    assert "train" not in failed.stdout
