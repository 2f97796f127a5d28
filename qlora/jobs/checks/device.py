"""The device: which, what it can, and what is free of it."""

from __future__ import annotations

import platform
import subprocess

from ...system import devices
from ...system.units import size

_TORCH = "https://pytorch.org/get-started/locally"


def device():
    """A product on the device that a training would use; what it is called, its driver, its bfloat16."""
    import torch

    if not torch.cuda.is_available():
        return _without_cuda(torch)
    if torch.ones(8, device="cuda").sum().item() != 8:
        return False, "the GPU adds eight ones to something else", "restart the machine; the card may be broken"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    from ... import base_model

    card = torch.device("cuda", torch.cuda.current_device())
    bf16 = "bfloat16" if base_model.computer(card).has_bfloat16 else "no bfloat16 of its own"
    name, total = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    found = [name, size(total), f"compute capability {capability}", bf16, f"driver {driver()}"]
    return True, ", ".join([*found, _as_planned(card)]), devices.remark()


def _as_planned(card):
    from ..planning.plan_job import card_of_device

    known = card_of_device(card)
    return f"planned as {known.name}" if known else "no card that the planner knows: memory is planned, speed is not"


def _without_cuda(torch):
    """A CPU is fine, unless there is a card that was meant."""
    from ... import base_model

    bf16 = "bfloat16" if base_model.computer(torch.device("cpu")).has_bfloat16 else "no bfloat16: computes in float32"
    cpu = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {bf16})"
    remark = devices.remark()
    if remark is None:
        return True, f"{cpu}; no GPU", None
    if not devices.has_nvidia_driver():
        return True, f"{cpu}; {remark.removeprefix('cpu: ')}", None
    if torch.version.cuda is None:
        return False, remark, f"python -m pip install --force-reinstall torch, with the index that {_TORCH} names"
    torch.cuda.init()  # raises what is wrong
    return False, remark, "nvidia-smi says whether the driver works; in a container: docker run --gpus all"


def driver():
    """Return the version of the NVIDIA driver, or a question mark."""
    lines = ask("--query-gpu=driver_version")
    return lines[0] if lines else "?"


def ask(query):
    """Return the lines that nvidia-smi answers to a query; none where it is missing or does not answer."""
    command = devices.nvidia_smi()
    if command is None:
        return []
    try:
        done = subprocess.run(
            [command, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def gpu_memory():
    """What is free of the card, and who has the rest."""
    import torch

    from ..planning.plan_job import held_by_others

    if not torch.cuda.is_available():
        return True, "no GPU is used", None
    free, total = torch.cuda.mem_get_info()
    others = held_by_others(torch.device("cuda"))
    found = f"{size(free)} of {size(total)} free"
    if not others:
        return True, found, None
    processes = "; ".join(ask("--query-compute-apps=pid,process_name,used_memory")) or "nvidia-smi lists them"
    found += f", {size(others)} held by others ({processes})"
    return others < total / 4, found, "end the others, or move the desktop to another card; a plan counts what is free"


def pinned_memory():
    """Host memory that a card copies from, for paged optimizer states and memory.offload. WSL2 gives little."""
    import torch

    if not torch.cuda.is_available():
        return True, "no GPU is used", None
    wanted = 2**30
    try:
        torch.empty(wanted, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        where = " by WSL2" if "microsoft" in platform.uname().release.lower() else ""
        found = f"{size(wanted)} refused{where}: {str(error).splitlines()[0]}"
        return (
            False,
            found,
            "set memory.offload=false; raise ulimit -l; in WSL2: memory= in .wslconfig, then wsl --shutdown",
        )
    return True, f"{size(wanted)} given", None
