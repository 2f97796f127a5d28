"""The gpu tier where there is no GPU: the CPU poses as cuda:0, and mixing devices raises."""

import os

import pytest

from tests import forked

# the whole ways and what is particular to CUDA
CHOSEN = "nf4_codes or (exports_proven and llama) or stopped_and_resumed or 64-16-2 or 128-None-8 or joined"


@pytest.mark.parametrize("chosen", [CHOSEN, pytest.param("test", marks=pytest.mark.slow)], ids=["some", "all"])
def test_the_gpu_tier_passes_on_a_pretended_device(chosen):
    words = "-q -p no:cacheprovider -p tests.pretended tests/test_gpu.py tests/test_hot_path.py".split()
    options = ["-m", "gpu and not real_gpu", "-k", chosen, "-W", "ignore:Module already imported"]
    # transformers reads weights in threads, which do not share the mode that pretends
    environ = os.environ | {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
    code = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = forked.run("-c", code, *words, *options, cwd=forked.ROOT, environ=environ)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
