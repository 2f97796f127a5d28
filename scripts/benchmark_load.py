"""What a base costs before its weights are loaded: hashes and the check for non-finite numbers; twice, at once, remembered.

    python scripts/benchmark_load.py --gib 1

Writes random shards into a temporary folder. Each round opens them in turn: one pass for the hashes and one for the check, as
two separate readers do; both at once, as the first verb on a base does; and from memory, as all later ones do. Before each the
files are put out of the page cache. Prints medians, and how many times faster the latter two are.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qlora import base_model
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


if __name__ == "__main__":
    main()
