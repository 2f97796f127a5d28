"""Compare the micro-batches of short rows, in turn, in one run: one row at a time, joined (auto), and TRL's padded batch.

    python scripts/benchmark_micro_batches.py --model FOLDER --data FILE [--rows 16] [--steps 8] [--rounds 3]
    python scripts/benchmark_micro_batches.py --model FOLDER --data FILE --tokens 512,1024,2048,4096   on a CPU

A step has --rows rows on every side, with the same base, rank, learning rate and answers. "rows" is
training.tokens_per_micro_batch: null with one row in a micro-batch, "auto" the default; with --tokens also joined
micro-batches of these sizes, as a plan on a CPU would choose them if it had them for its limit. "trl" is the plain side of
benchmark_train.py, a padded batch of all rows of the step. Each side runs in a process of its own. Printed are the medians of
tokens/s, padding not counted, over the steps after the first two, and of the peak memory.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def ours(args, side):
    """Return {"rate", "peak_bytes", "losses"} of qlora with the micro-batches of `side`: rows, auto, or a number of tokens."""
    from qlora import Recipe, planner, train
    from qlora.runs import record

    if side.isdigit():
        planner._TOKENS_ON_CPU = int(side)
    with tempfile.TemporaryDirectory() as folder:
        run = train(
            Recipe.from_dict(
                {
                    "model": {"name_or_path": args.model},
                    "data": {"train": args.data, "max_length": 1024},
                    "training": {
                        "max_steps": args.steps,
                        "gradient_accumulation_steps": args.rows,
                        "tokens_per_micro_batch": None if side == "rows" else "auto",
                        "learning_rate": 1e-3,
                        "warmup_ratio": 0.0,
                        "optim": "adamw_torch",
                    },
                    "output_dir": str(Path(folder) / "run"),
                }
            )
        )
        steps = [line for line in record.read(run) if isinstance(line, record.Step)]
        measured = json.loads(run.memory_file.read_text())
    return {
        "rate": statistics.median(step.tokens_per_second for step in steps[2:]),
        "peak_bytes": measured["peak_bytes"],
        "losses": [step.loss for step in steps],
    }


def trl(args):
    """Return {"rate"} of the plain side of benchmark_train.py."""
    script = Path(__file__).with_name("benchmark_train.py")
    command = [sys.executable, script, "--model", args.model, "--data", args.data, "--steps", args.steps, "--rounds", 1,
               "--batch", args.rows, "--only", "plain"]  # fmt: skip
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=True)
    return {"rate": float(re.search(r"plain\s+(\d+) tokens/s", done.stdout)[1])}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", default="", help="sizes of micro-batches beside those of auto, on a CPU")
    parser.add_argument("--no-trl", action="store_true")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(ours(args, args.side)))
        return
    found = {side: [] for side in ["rows", "auto", *filter(None, args.tokens.split(",")), *["trl"] * (not args.no_trl)]}
    for number in range(args.rounds):
        for side in list(found)[:: 1 if number % 2 == 0 else -1]:
            if side == "trl":
                found[side].append(trl(args))
            else:
                command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}  {side:5} {found[side][-1]['rate']:8.0f} tokens/s", flush=True)
    first = statistics.median(one["rate"] for one in found["rows"])
    for side, runs in found.items():
        rates = sorted(one["rate"] for one in runs)
        rate, losses = statistics.median(rates), runs[0].get("losses")
        peak = f"  peak {statistics.median(one['peak_bytes'] for one in runs) / 2**30:.2f} GiB" if losses else ""
        loss = f"  loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
        spread = f"({rates[0]:.0f}-{rates[-1]:.0f})"
        print(f"median  {side:5} {rate:8.0f} tokens/s {spread}, {rate / first:.2f} of rows{peak}{loss}")


if __name__ == "__main__":
    main()
