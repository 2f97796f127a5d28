"""A GPU that is there and not used is said, and several of which one is used. None is here: torch is told that it has some."""

import pytest
import torch

from qlora import InputError, evaluate
from qlora.system import devices


@pytest.fixture
def no_driver(monkeypatch):
    monkeypatch.setattr(devices, "has_nvidia_driver", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def cuda(monkeypatch, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 4090")


def test_a_cpu_alone_and_one_card_alone_are_what_everyone_expects(no_driver, monkeypatch):
    assert devices.remark() is None
    cuda(monkeypatch, 1)
    assert devices.remark() is None


@pytest.mark.parametrize("kind", ["Apple", "Intel"])
def test_a_gpu_of_another_kind_is_not_silently_a_cpu(no_driver, monkeypatch, kind):
    module = torch.backends.mps if kind == "Apple" else torch.xpu
    monkeypatch.setattr(module, "is_available", lambda: True)
    assert devices.remark().startswith(f"cpu: {kind}'s GPU is not used")


def test_an_nvidia_driver_that_torch_cannot_use_is_said(no_driver, monkeypatch):
    monkeypatch.setattr(devices, "has_nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; qlora doctor" in devices.remark()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "built for CUDA 13.0, cannot use it" in devices.remark()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so the user wants it
    assert devices.remark() is None


def test_of_several_gpus_the_one_that_is_used_is_named(monkeypatch):
    cuda(monkeypatch, 2)
    assert devices.remark() == (
        "cuda:0: NVIDIA GeForce RTX 4090, one of 2 GPUs; choose another with CUDA_VISIBLE_DEVICES=1"
    )


def test_a_card_of_amd_is_said_to_be_untested(monkeypatch):
    cuda(monkeypatch, 1)
    monkeypatch.setattr(torch.version, "hip", "7.2.1")
    assert "an AMD GPU with ROCm 7.2.1, which is not tested" in devices.remark()


def test_a_verb_says_it_in_one_line(no_driver, monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(InputError, match="neither a run nor a model"):
        evaluate("./none")
    assert capsys.readouterr().err.count("device    cpu: Apple's GPU is not used") == 1
