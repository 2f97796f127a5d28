"""llama.cpp's own programs where the user has them: its converter and its quantizer."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ...system.errors import InputError
from ...system.extras import how_to_install

_CONVERTER, _QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"


def _find(name):
    """Return the path of llama.cpp's `name` in $LLAMA_CPP, $LLAMA_CPP/build/bin or on PATH, or None.

    Raises:
        InputError: LLAMA_CPP names a folder that has none of its programs.
    """
    root = os.environ.get("LLAMA_CPP")
    if root:
        places = (Path(root), Path(root) / "build" / "bin")
        for place in places:
            if (place / name).is_file():
                return place / name
        if not any((place / known).is_file() for place in places for known in (_CONVERTER, _QUANTIZER)):
            raise InputError(
                f"LLAMA_CPP is {root}, where neither {_CONVERTER} nor build/bin/{_QUANTIZER} is; set it to the folder of "
                "llama.cpp, or remove it"
            )
    found = shutil.which(name)
    return Path(found) if found else None


def converter():
    """Return the path of llama.cpp's converter, or None where the user has none."""
    return _find(_CONVERTER)


def quantizer():
    """Return quantize(f16 file, out file) -> None; raises InputError if no quantizer is there."""
    program = _find(_QUANTIZER)
    if program is not None:
        return lambda source, out: run([str(program), str(source), str(out), "Q4_K_M"])
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError(
            f"--gguf q4_k_m needs llama.cpp's quantizer: {how_to_install('gguf')}, or put llama-quantize on the PATH, or "
            "set LLAMA_CPP to the folder that llama.cpp was built in"
        )
    return lambda source, out: run([sys.executable, "-c", _QUANTIZE, str(source), str(out)])


# in a process of its own: it writes a line a tensor to stderr, and what aborts there does not take the export along
_QUANTIZE = """
import ctypes, os, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
sys.exit(llama_cpp.llama_model_quantize(os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), ctypes.byref(params)))
"""


def run(command):
    """Run a program to its end; raises InputError with its last lines where it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode != 0:
        last = "\n  ".join(done.stdout.strip().splitlines()[-5:])
        raise InputError(f"{Path(command[0]).name} {Path(command[1]).name} failed:\n  {last}")
