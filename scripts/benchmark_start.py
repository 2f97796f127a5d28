"""What each verb costs on almost no work: starting Python, importing, opening a model. Here, and in another checkout.

    python scripts/benchmark_start.py --model FOLDER --against OTHER_CHECKOUT

FOLDER is a tiny model (scripts/random_model.py --shape tiny). In each round every verb runs once in each checkout, in turn, on
copies of the same recipe and rows; prints medians of processor seconds (user and system, of all its threads) and their ratio.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
RECIPE = """
model: {{name_or_path: {model}}}
data: {{train: rows.jsonl, eval_fraction: 0.25, max_length: 128}}
training: {{max_steps: 1, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}}
output_dir: run
"""
VERBS = {
    "--help": "--help",
    "adapters": "adapters .",
    "doctor": "doctor",
    "data": "data recipe.yaml",
    "plan": "plan recipe.yaml",
    "train": "train recipe.yaml",
    "eval": "eval run --max-rows 1",
    "export": "export run --out model",
    "chat": "chat model --prompt Hello --max-new-tokens 2",
}


def processor_seconds(checkout, folder, words):
    """Return what `qlora WORDS` of a checkout takes, of the process and of those that it starts; None if it failed."""
    environ = os.environ | {"PYTHONPATH": str(checkout), "QLORA_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "qlora", *words.split()],
        cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        print(
            f"{checkout.name}: qlora {words}: {(done.stderr or done.stdout).strip().splitlines()[-1]}", file=sys.stderr
        )
        return None
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepared(folder, model):
    folder.mkdir()
    (folder / "recipe.yaml").write_text(RECIPE.format(model=json.dumps(str(model.resolve()))))
    rows = [{"prompt": f"What is {n} plus {n}?", "completion": f"It is {n + n}."} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a tiny model")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sides = {"here": HERE} | ({"other": args.against.resolve()} if args.against else {})
    found: dict = {verb: {side: [] for side in sides} for verb in VERBS}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as work:
            folders = {side: prepared(Path(work) / side, args.model) for side in sides}
            for verb, words in VERBS.items():
                for side in list(sides)[:: 1 if number % 2 else -1]:
                    found[verb][side].append(processor_seconds(sides[side], folders[side], words))
    for verb, of in found.items():
        known = {side: [one for one in seconds if one is not None] for side, seconds in of.items()}
        cells = [
            f"{statistics.median(all_):.2f} ({min(all_):.2f}-{max(all_):.2f})" if all_ else "failed"
            for all_ in known.values()
        ]
        both = len(known) == 2 and all(known.values())
        ratio = f"{statistics.median(known['here']) / statistics.median(known['other']):.2f}" if both else ""
        print("| " + " | ".join([verb, *cells, ratio]) + " |")
    if any(None in seconds for seconds in (of["here"] for of in found.values())):
        sys.exit("a verb of this checkout failed")


if __name__ == "__main__":
    main()
