"""What is read is what safetensors reads, from the cache or past it, whole or by rows."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.base_model import Checkpoint
from qlora.exporter.reader import Reader
from qlora.exporter.writer import Spec, write
from qlora.kernels.threads import Cores
from qlora.system.errors import InputError

TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8),  # so that what follows begins at no even place
    "matrix": torch.randn(3000, 700).bfloat16(),
    "large": torch.randn(2100, 3000),  # more than two pieces of 8 MiB
    "vector": torch.randn(5).half(),
    "scalar": torch.tensor(3.5),
}


@pytest.fixture(params=["cached", "past the cache", "tmpfs"])
def checkpoint(request, tmp_path):
    folder = tmp_path
    if request.param == "tmpfs":
        folder = Path("/dev/shm") / f"qlora-test-{os.getpid()}"
        if not folder.parent.is_dir():
            pytest.skip("no /dev/shm, which is a tmpfs, here")
        folder.mkdir()
    path = folder / "model.safetensors"
    save_file(TENSORS, path)
    if request.param == "past the cache":
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    yield Checkpoint("x", folder, None, dict.fromkeys(TENSORS, path.name))
    path.unlink()
    if request.param == "tmpfs":
        folder.rmdir()


def test_whole_tensors_and_rows_are_those_in_the_file(checkpoint):
    with Reader(checkpoint) as reader, Cores("cpu") as cores:
        for name, tensor in TENSORS.items():
            assert reader.shape(name) == tuple(tensor.shape)
            for each in (map, cores.map):
                found = reader.whole(name, each)
                assert found.dtype == tensor.dtype
                assert torch.equal(found, tensor)
        for name in ("matrix", "large", "vector"):
            rows = reader.rows(name)
            for first, last in ((0, 1), (1, 5), (2, 2), (3, 9999)):
                assert torch.equal(rows[first:last], TENSORS[name][first:last])


def test_a_file_that_ends_too_soon_is_an_error_never_other_numbers(checkpoint):
    path = checkpoint.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with Reader(checkpoint) as reader:
        last = max(TENSORS, key=lambda name: reader.rows(name).offset)
        with pytest.raises(InputError, match="bytes are missing at its end"):
            reader.whole(last)


def test_what_was_written_past_the_cache_is_read_back(tmp_path):
    specs = [Spec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]
    write(tmp_path, specs, lambda name: TENSORS[name].split(333) if TENSORS[name].dim() else [TENSORS[name]], 10**9)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
