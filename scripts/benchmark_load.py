"""What a base costs before its weights are loaded: hashes and the check for non-finite numbers; twice, at once, remembered.
And what a start reads from the disk: these and loading, the first time and again.

    python scripts/benchmark_load.py --gib 1

Writes random shards into a temporary folder. Each round opens them in turn: one pass for the hashes and one for the check, as
two separate readers do; both at once, as the first verb on a base does; and from memory, as all later ones do. Before each the
files are put out of the page cache. Prints medians, and how many times faster the latter two are. Then a process of its own
loads a model of the same size in 4 bit, as a verb does, with nothing remembered and again, each out of the page cache; bytes are
those that the kernel read from the disk for it (read_bytes of /proc/self/io).
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora import base_model
from qlora.recipe import Model, Quantization
from qlora.system.storage import sha256


def write_shards(folder, num_bytes, num_shards):
    """Write shards of bfloat16 matrices, num_bytes in all; return the Checkpoint."""
    side = 2048
    num_matrices = max(1, round(num_bytes / num_shards / (2 * side * side)))
    files = {}
    for shard in range(num_shards):
        names = [f"{shard}.{number}.weight" for number in range(num_matrices)]
        name = f"model-{shard}.safetensors"
        save_file({one: torch.randn(side, side, dtype=torch.bfloat16) for one in names}, folder / name)
        files |= dict.fromkeys(names, name)
    (folder / "config.json").write_text("{}")
    return base_model.Checkpoint("random", folder, None, files)


def two_passes(checkpoint):
    paths = sorted({checkpoint.folder / name for name in checkpoint.files.values()})
    hashes = {path.name: sha256(path) for path in paths}
    for path in paths:
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).aminmax().max.isfinite() for key in file.keys())  # noqa: SIM118
    return hashes


def one_pass(checkpoint):
    return checkpoint.file_hashes(fully=True)


def remembered(checkpoint):
    return checkpoint.file_hashes()


def bytes_read():
    """Return the bytes that this process had read from disks, not from the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


def bytes_of_a_start(folder):
    """Return the bytes read while the model in `folder` is opened, hashed, checked and loaded in 4 bit."""
    section = Model(name_or_path=str(folder))
    before = bytes_read()
    checkpoint = base_model.find(section)
    base_model.load(checkpoint, section, Quantization(), device="cpu")
    checkpoint.file_hashes()
    return bytes_read() - before


def count_a_start(num_bytes):
    """Print how often a start reads the weights of a Llama of about this many bytes."""
    hidden, layers = 1024, max(1, round((num_bytes - 4 * 1024 * 32000) / 2 / (12 * 1024**2)))
    shape = {"vocab_size": 32000, "hidden_size": hidden, "intermediate_size": 2816,
             "num_hidden_layers": layers, "num_attention_heads": 16}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["QLORA_CACHE"] = cache
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
        tensors = {name: torch.randn(x.shape).bfloat16() * 0.02 for name, x in model.state_dict().items()}
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(folder)
        save_file(tensors, Path(folder) / "model.safetensors", {"format": "pt"})
        del tensors
        size = (Path(folder) / "model.safetensors").stat().st_size
        base_model.load(
            base_model.find(Model(name_or_path=folder)), Model(name_or_path=folder), Quantization(), device="cpu"
        )
        shutil.rmtree(cache)  # libraries and their code have been read by now
        time.sleep(3)
        for name in ("the first time", "again, remembered"):
            put_out_of_the_page_cache(Path(folder))
            found = bytes_of_a_start(Path(folder))
            print(
                f"a start, {name}: {found / 1e9:.3f} GB read, {found / size:.2f} x the weights of {size / 1e9:.3f} GB"
            )


def put_out_of_the_page_cache(folder):
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="of weights")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        os.environ["QLORA_CACHE"] = cache
        first = write_shards(Path(folder), args.gib * 2**30, args.shards)
        num_bytes = sum((first.folder / name).stat().st_size for name in set(first.files.values()))
        time.sleep(3)  # files that were just written are not remembered
        seconds: dict = {two_passes: [], one_pass: [], remembered: []}
        for _ in range(args.rounds):
            for side, found in seconds.items():
                checkpoint = base_model.Checkpoint("random", first.folder, None, first.files)
                put_out_of_the_page_cache(first.folder)
                start = time.monotonic()
                side(checkpoint)
                found.append(time.monotonic() - start)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    print(f"{num_bytes / 1e9:.2f} GB in {args.shards} shards; medians of {args.rounds}")
    for side, found in seconds.items():
        print(
            f"{side.__name__:12}{medians[side]:>10.3f} s  ({min(found):.3f}-{max(found):.3f})"
            f"{medians[two_passes] / medians[side]:>12.1f} x"
        )
    count_a_start(args.gib * 2**30)


if __name__ == "__main__":
    main()
