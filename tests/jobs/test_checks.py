"""qlora doctor: what is broken is found, named, and has a remedy; nothing that is broken ends in a traceback.

No card is here. Of one, torch is told what users have reported: the words of the errors are theirs.
"""

import importlib.metadata
import json
import os
import subprocess
import sys

import pytest
import torch

from qlora.jobs.checks import checks, computing, device, remedy_of, surroundings, tried, versions
from qlora.system import devices
from tests import forked


def test_this_machine_is_ready_and_nothing_is_left(tmp_path):
    done = forked.run("doctor", tmp_path / "runs" / "later", "--json")
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {name for name, check in found.items() if not check["ok"]} <= {"memory", "disk", "threads"}  # of the machine
    assert done.returncode == (0 if all(check["ok"] for check in found.values()) else 2)
    assert all(set(check) == {"name", "ok", "found", "remedy"} for check in found.values())
    assert {"python", "versions", "device", "nf4", "optimizer", "attention", "disk", "hub"} <= set(found)
    assert all(check["remedy"] for check in found.values() if not check["ok"])
    assert not list(tmp_path.iterdir())


def test_a_problem_is_shown_with_its_remedy_and_exits_2(tmp_path):
    (tmp_path / "runs").write_text("a file")
    done = forked.run("doctor", tmp_path / "runs" / "mine", environ={**os.environ, "WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert "is a file" in done.stdout
    assert "do: set output_dir to a folder" in done.stdout
    assert "do: start one, or unset WORLD_SIZE" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_torch_that_cannot_be_imported_is_a_failed_check_and_no_traceback(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "qlora", "doctor", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 2, done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "torch cannot be imported" in found["libraries"]["found"]
    assert "unset LD_LIBRARY_PATH" in found["libraries"]["remedy"]
    assert found["nf4"] == {"name": "nf4", "ok": False, "found": "not checked", "remedy": "see libraries"}
    assert found["python"]["ok"]
    assert "Traceback" not in done.stderr


def test_a_library_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    check = tried("libraries", versions.libraries)
    assert not check.ok
    assert "bitsandbytes cannot be imported" in check.found


def test_versions_outside_the_tested_range_are_named_with_the_command(monkeypatch):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.17.0" if name == "transformers" else real(name))
    check = tried("versions", versions.packages)
    assert (check.ok, check.found) == (False, "outside the tested range: transformers 5.17.0")
    assert check.remedy == "python -m pip install 'transformers<5.24,>=5.23'"


def test_an_extra_outside_its_range_is_said_and_one_that_is_missing_is_not(monkeypatch):
    def version(name):
        if name in ("wandb", "mlflow", "gradio"):
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9.9" if name == "sacrebleu" else real(name)

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", version)
    check = tried("versions", versions.packages)
    assert check.ok
    assert check.found.endswith("; for an extra, outside the tested range: sacrebleu 9.9.9")
    assert check.remedy == "python -m pip install 'sacrebleu<2.7,>=2.6'"


@pytest.mark.parametrize(
    ("extras", "some"), [(False, {"torch", "trl", "psutil"}), (True, {"gguf", "mlflow", "torchao"})]
)
def test_the_ranges_are_those_of_the_installed_package_without_a_checkout(monkeypatch, tmp_path, extras, some):
    here = {one.name for one in versions.ranges(extras)}
    monkeypatch.setattr(versions, "_PROJECT", tmp_path / "none")
    there = {one.name for one in versions.ranges(extras)}
    assert there == here > some
    assert "ruff" not in here


REPORTED = {
    # hiyouga/LlamaFactory 1573: it trained on the CPU without a word
    "The NVIDIA driver on your system is too old (found version 11040).": "update the NVIDIA driver",
    # pytorch/pytorch 167244, an RTX 5090
    "CUDA error: no kernel image is available for execution on the device": "pip install --upgrade torch",
    # bitsandbytes-foundation/bitsandbytes 208
    "Method 'cquantize' not available in CPU-only version of bitsandbytes.": "unset BNB_CUDA_VERSION",
    "Configured CUDA binary not found at libbitsandbytes_cuda139.so": "unset BNB_CUDA_VERSION",
    "CUDA unknown error - this may be due to an incorrectly set up environment": "nvidia_uvm",
    "CUDA error: out of memory": "nvidia-smi",
    "/lib/libc.so.6: version 'GLIBC_2.34' not found (required by libtorch_cpu.so)": "ubuntu:24.04",
    "anything else": "constraints.txt",
}


@pytest.mark.parametrize("text", REPORTED)
def test_what_users_have_reported_has_a_remedy(text):
    assert REPORTED[text] in remedy_of(f"RuntimeError: {text}")


def test_a_driver_that_is_too_old_is_a_problem_and_not_a_cpu(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update")

    monkeypatch.setattr(devices, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    check = tried("device", device.device)
    assert not check.ok
    assert check.found == "RuntimeError: The NVIDIA driver on your system is too old (found version 11040)."
    assert "update the NVIDIA driver" in check.remedy


def test_a_torch_without_cuda_beside_a_driver_is_a_problem(monkeypatch):
    monkeypatch.setattr(devices, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    check = tried("device", device.device)
    assert not check.ok
    assert "is a build without CUDA" in check.found
    assert "--force-reinstall torch" in check.remedy


def test_a_gpu_of_apple_is_fine_and_said_to_be_unused(monkeypatch):
    monkeypatch.setattr(devices, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    check = tried("device", device.device)
    assert check.ok
    assert "Apple's GPU is not used" in check.found


@pytest.mark.parametrize(("free", "ok"), [(23.9, True), (22, True), (12, False)])
def test_a_card_that_others_fill_is_a_problem_and_a_desktop_is_not(monkeypatch, free, ok):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(free * 2**30), 24 * 2**30))
    check = tried("gpu memory", device.gpu_memory)
    assert check.ok == ok
    assert ("held by others" in check.found) == (free < 23)


def test_pinned_memory_that_is_refused_is_a_problem(monkeypatch):
    """As in microsoft/WSL 14078; here nothing can be pinned, because there is no card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check = tried("pinned memory", device.pinned_memory)
    assert not check.ok
    assert "memory.offload=false" in check.remedy


def test_a_layer_that_computes_something_else_is_found(monkeypatch):
    import bitsandbytes

    forward = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", lambda self, x: 1.05 * forward(self, x))
    check = tried("nf4", computing.nf4_step)
    assert not check.ok
    assert "forward 5.0% and backward" in check.found


def test_a_layer_whose_gradient_is_wrong_is_found(monkeypatch):
    import bitsandbytes

    forward = bitsandbytes.nn.Linear4bit.forward
    monkeypatch.setattr(
        bitsandbytes.nn.Linear4bit, "forward", lambda self, x: forward(self, 1.05 * x - 0.05 * x.detach())
    )
    check = tried("nf4", computing.nf4_step)
    assert not check.ok
    assert "forward 0." in check.found


def test_whether_there_is_a_login_is_said_and_the_token_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    check = tried("hub", surroundings.hub)
    assert check.ok
    assert "no login" in check.found
    assert "hf auth login" in check.remedy
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    check = tried("hub", surroundings.hub)
    assert "a login is stored" in check.found
    assert "hf_secret" not in f"{check}"
    assert "hf auth login" not in (check.remedy or "")


def test_the_limits_of_a_container_are_read(tmp_path):
    """Version 2 of control groups, the least of the group and those around it; version 1; none."""
    own = tmp_path / "cgroup"
    own.write_text("0::/user.slice/mine\n")
    groups = tmp_path / "fs"
    (groups / "user.slice" / "mine").mkdir(parents=True)
    assert surroundings.memory_limit(groups, own) is None
    (groups / "user.slice" / "mine" / "memory.max").write_text("max\n")
    (groups / "user.slice" / "memory.max").write_text(f"{8 * 2**30}\n")
    (groups / "user.slice" / "mine" / "cpu.max").write_text("150000 100000\n")
    assert surroundings.memory_limit(groups, own) == 8 * 2**30
    assert surroundings.core_limit(groups, own) == 1.5
    (groups / "memory").mkdir()
    (groups / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert surroundings.memory_limit(groups, tmp_path / "none") is None


def test_more_threads_than_cores_are_a_problem(monkeypatch):
    monkeypatch.setattr(surroundings, "core_limit", lambda: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    check = tried("threads", surroundings.threads)
    assert (check.ok, check.remedy) == (False, "OMP_NUM_THREADS=1")


def test_a_folder_that_cannot_be_written_to_is_a_problem():
    check = tried("disk", lambda: surroundings.disk("/proc/runs"))
    assert not check.ok
    assert "output_dir" in check.remedy


def test_a_cache_that_cannot_be_written_to_is_a_problem(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/cache")
    check = tried("hub", surroundings.hub)
    assert not check.ok
    assert "HF_HOME" in check.remedy


def test_a_token_in_an_error_of_a_library_is_not_shown():
    def leaks():
        raise RuntimeError("401 for hf_" + "a1B2" * 9)

    assert "a1B2" not in tried("hub", leaks).found


def test_checks_come_one_by_one(tmp_path):
    assert next(iter(checks(tmp_path))).name == "python"
