"""pytest plugin: each test runs with the CPU posing as cuda:0 (scripts/pretended_cuda.py).

HF_DEACTIVATE_ASYNC_LOAD=1 python -m pytest -p tests.pretended -m "gpu and not real_gpu"
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
import pretended_cuda


def pytest_configure(config):
    pretended_cuda.install()
    # the loader's thread asks the real torch for an accelerator
    config.addinivalue_line("filterwarnings", "ignore:'pin_memory' argument is set as true but no accelerator")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with pretended_cuda.active():
        return (yield)
