"""scripts/gpu_check.py: everything of it but CUDA. What it measures is tested where it is computed."""

import argparse
import importlib.util
import json
import sys
import time

import psutil
import pytest

from tests import forked
from tests.test_layout import ROOT


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_run, _, gpu_check, gpu_table = map(loaded, ("gpu_run", "gpu_setup", "gpu_check", "gpu_table"))


def forever():
    return True


@pytest.mark.parametrize("start", [100, 40_000, 50_000, 90_000])
def test_the_longest_row_is_found_from_wherever_the_plan_begins(start):
    tried = []
    good, bad, why = gpu_check.bisected(
        lambda tokens: tried.append(tokens) or tokens <= 50_000, start, 131_072, forever
    )
    assert good <= 50_000 < bad
    assert bad - good <= 0.02 * good
    assert not why
    assert len(tried) < (45 if start == 100 else 12)
    assert len(set(tried)) == len(tried)


def test_a_search_ends_at_the_model_s_own_limit_at_nothing_and_with_the_time():
    assert gpu_check.bisected(lambda tokens: True, 1000, 1500, forever) == (1500, None, "")
    assert gpu_check.bisected(lambda tokens: False, 9, 1500, forever) == (None, 1, "")
    assert gpu_check.bisected(lambda tokens: True, 1000, 1500, lambda: False) == (None, None, "the time was over")


def test_a_run_that_breaks_for_another_reason_keeps_what_was_found():
    def fits(tokens):
        if tokens > 1000:
            raise RuntimeError("the driver has left")
        return True

    found = gpu_check.bisected(fits, 1000, 9000, forever)
    assert found == (1000, None, "1,200 tokens: the driver has left")
    row = gpu_check.longest_row("rows", 1000, 9000, *found)
    assert (row.ok, row.measured) == (True, 1000)
    assert "the driver has left" in row.notes


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_began(tmp_path):
    code = "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, flush=True); sys.stdin.read()"
    with open(tmp_path / "log", "w") as log:
        assert gpu_run.limited([sys.executable, "-c", f"{code}; import time; time.sleep(60)"], 1, log, None) is None
    child = int((tmp_path / "log").read_text())
    until = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" and time.monotonic() < until:
        time.sleep(0.01)
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"


def test_an_emulated_card_is_not_larger_than_what_a_desktop_has_left(tmp_path):
    check = gpu_check.Check(argparse.Namespace(folder=tmp_path, emulate_gib=23.5, minutes=1))
    check.about = {"free_bytes": 22 * 2**30}
    assert check.cap() == ["--cap-gib", "22.00"]
    check.about = {"free_bytes": 79 * 2**30}
    assert (check.cap(), check.budget()) == (["--cap-gib", "23.50"], 23.5 * 2**30)


RUN = {"rate": 2000.0, "peak_bytes": 9 * 2**30, "predicted_bytes": 10 * 2**30, "layers": 32, "checkpointed_layers": 12,
       "offload": False, "reserved_bytes": 11 * 2**30, "context_bytes": 2**29}  # fmt: skip
PLAIN = {"rate": 1000.0, "peak_bytes": 12 * 2**30}


def test_rates_are_compared_by_medians_and_a_side_that_fails_is_a_row():
    sides = {"qlora": [RUN, RUN | {"rate": 2600.0}, RUN], "plain": [PLAIN] * 3, "unsloth": []}
    failed = {"unsloth": {"error": "ImportError: no triton", "out_of_memory": False}}
    rate, peak, unsloth = gpu_check.speed_rows("full rows", {"sides": sides, "failed": failed}, "ended with 1")
    assert (rate.measured, rate.compared, rate.runs["qlora"]) == (2000.0, {"plain": 1000.0}, [2000.0, 2600.0])
    assert (peak.measured, peak.compared) == (9, {"plain": 12})
    assert (unsloth.ok, unsloth.why) == (False, "ImportError: no triton")


def test_rounds_that_were_done_count_when_the_time_is_over():
    *rows, last = gpu_check.speed_rows("x", {"sides": {"qlora": [RUN], "plain": [PLAIN]}}, "the time was over")
    assert [row.ok for row in rows] == [True, True]
    assert (last.case, last.why) == ("x: further rounds", "the time was over")
    (nothing,) = gpu_check.speed_rows("x", {}, "the time was over")
    assert not nothing.ok


def test_a_peak_is_compared_with_its_plan():
    row = gpu_check.memory_row("x", {"sides": {"qlora": [RUN]}}, "")
    assert (row.measured, row.compared) == (9, {"plan": 10})
    assert row.notes == "12 of 32 layers checkpointed; 11.00 GiB reserved by torch; 0.50 GiB beside torch"
    assert gpu_check.memory_row("x", {"failed": {"qlora": {"error": "out of memory"}}}, "").why == "out of memory"


def test_kernels_are_compared_with_none():
    steps = {"off": [{"seconds": 2.0, "kept_bytes": 2**21}], "all": [{"seconds": 1.0, "kept_bytes": 2**20}]}
    (row,) = gpu_check.kernel_rows(steps, 1000)
    assert (row.case, row.measured, row.compared) == ("all", 1000, {"off": 500})


def test_the_table_has_every_row_with_its_ratio_and_what_was_not_done():
    rows = [
        gpu_check.Row("speed", "full", unit="tokens/s", measured=2000.0, compared={"plain": 1000.0},
                      runs={"qlora": [1900.0, 2100.0]}),
        gpu_check.Row("speed", "unsloth", False, "not|installed\nhere"),
    ]  # fmt: skip
    about = {
        "card": "NVIDIA GeForce RTX 4090",
        "total_bytes": 2**34,
        "free_bytes": 2**33,
        "driver": "580.1",
        "minutes": 3,
    }
    about |= {"versions": {"torch": "2.11.0"}, "outside_tested_range": {"torch": "2.1, tested: torch>=2.10"}}
    text = gpu_table.markdown(about | {"rows": [vars(row) for row in rows]})
    assert "| speed | full | 2,000 tokens/s (1,900-2,100) | plain 1,000 | 2.00 |  |" in text
    assert "| speed | unsloth | **not done** |  |  | not\\|installed here |" in text
    assert "NVIDIA GeForce RTX 4090 (16.0 GiB, 8.0 free), driver 580.1" in text
    assert "Outside the tested range: torch 2.1, tested: torch>=2.10" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} == {7}


def test_without_time_every_part_is_a_row_that_says_so(tmp_path):
    done = forked.run(ROOT / "scripts" / "gpu_check.py", "--folder", tmp_path / "check", "--minutes", "0.0001")
    assert done.returncode == 1
    rows = json.loads((tmp_path / "check" / "check.json").read_text())["rows"]
    assert [row["part"] for row in rows] == ["set-up", *gpu_check.PARTS]
    assert {row["why"] for row in rows} == {"the time was over"}
    assert (tmp_path / "check" / "check.md").read_text().count("**not done**") == len(rows)


@pytest.mark.parametrize(
    "wrong", ["--parts speed,sped", "--minutes 0", "--emulate-gib -1", "--tokens 1", "--shape 8b", "--rounds 0"]
)
def test_wrong_options_are_refused_before_anything_is_done(tmp_path, wrong):
    done = forked.run(ROOT / "scripts" / "gpu_check.py", "--folder", tmp_path / "check", *wrong.split())
    assert done.returncode == 2
    assert not (tmp_path / "check").exists()


@pytest.mark.slow
def test_the_whole_check_runs_on_a_cpu(tmp_path):
    """Two minutes; unsloth needs a GPU, and so do the tests."""
    options = "--shape tiny --tokens 32 --steps 3 --rounds 1 --emulate-gib 4 --tests tests/test_gpu.py"
    forked.run(ROOT / "scripts" / "gpu_check.py", "--folder", tmp_path, *options.split(), cwd=ROOT, timeout=900)
    found = json.loads((tmp_path / "check.json").read_text())
    failed = {(row["part"], row["case"]) for row in found["rows"] if not row["ok"]} - {("doctor", "all checks")}
    assert failed == {("tests", "pytest -m gpu"), ("speed", "unsloth")}
    assert {row["part"] for row in found["rows"] if row["measured"]} == {
        "memory",
        "speed",
        "longest",
        "kernels",
        "export",
    }
    assert found["card"] is None
