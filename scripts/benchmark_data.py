"""Rows a second and peak memory of reading, tokenizing, masking and packing: qlora against TRL's own preparation of the
same rows, in turn, each in a process of its own, nothing cached.

    python scripts/benchmark_data.py --model FOLDER --data alpaca.json --rows 20000

Both sides end with packed rows of --max-length tokens in which the answers alone are trained. TRL gets prompt/completion
messages from `datasets.load_dataset` and packs by "bfd". Prints medians, and our number over theirs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ours(args, workers):
    from qlora import base_model, data
    from qlora.data import chat
    from qlora.recipe import Data, Model

    model = Model(name_or_path=args.model)
    tokenizer = base_model.load_tokenizer(base_model.find(model).folder, model)
    chat.set_template(tokenizer, None)
    section = Data(train=args.file, max_length=args.max_length, overlong="truncate", num_proc=workers)
    start = time.monotonic()
    rows = data.Rows(data.load(section.train, tokenizer, section, seed=0))
    packs = data.pack(rows, args.max_length)
    return time.monotonic() - start, len(rows), len(packs)


def theirs(args, workers):
    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    seconds = []

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            start = time.monotonic()
            prepared = super()._prepare_dataset(*args, **kwargs)
            seconds.append(time.monotonic() - start)
            return prepared

    def prompt_and_completion(row):
        user = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        return {
            "prompt": [{"role": "user", "content": user}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }

    start = time.monotonic()
    cache = tempfile.mkdtemp(dir=args.scratch)
    rows = datasets.load_dataset("json", data_files=args.file, split="train", cache_dir=cache)
    rows = rows.map(prompt_and_completion, remove_columns=rows.column_names, num_proc=workers)
    reading = time.monotonic() - start
    trainer = Timed(
        LlamaForCausalLM(config).to(torch.bfloat16),
        SFTConfig(
            output_dir=args.scratch,
            max_length=args.max_length,
            packing=True,
            dataset_num_proc=workers,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    return reading + seconds[0], len(rows), len(trainer.train_dataset)


SIDES = {"qlora": ours, "trl": theirs}


def run_side(args):
    import resource

    seconds, rows, packs = SIDES[args.side](args, args.workers)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    print(json.dumps({"seconds": seconds, "rows": rows, "packs": packs, "peak": peak}))


def measure(args, side, workers):
    """Run one side in a process of its own and return what it printed."""
    with tempfile.TemporaryDirectory(dir=args.scratch) as cache:
        command = [sys.executable, __file__, "--side", side, "--workers", str(workers), "--file", args.file]
        command += ["--model", args.model, "--max-length", str(args.max_length), "--scratch", args.scratch]
        environment = {**os.environ, "QLORA_CACHE": cache, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{side} failed:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])


def write_rows(source, count, path):
    """Write `count` rows of the Alpaca file `source` as JSON Lines, each a different one; return the bytes."""
    rows = json.loads(Path(source).read_text(encoding="utf-8"))
    with open(path, "w", encoding="utf-8") as file:
        for index in range(count):
            row = rows[index % len(rows)]
            again = f"({index // len(rows)}) " if index >= len(rows) else ""
            kept = {"instruction": again + row["instruction"], "input": row["input"], "output": row["output"]}
            file.write(json.dumps(kept, ensure_ascii=False) + "\n")
    return Path(path).stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a tokenizer that has a chat template")
    parser.add_argument("--data", help="an Alpaca file: a JSON array of instruction, input, output")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    with tempfile.TemporaryDirectory() as args.scratch:
        args.file = str(Path(args.scratch) / "rows.jsonl")
        size = write_rows(args.data, args.rows, args.file)
        found = {}
        for _ in range(args.repeats):
            for workers in (1, 2):
                for side in SIDES:
                    found.setdefault((side, workers), []).append(measure(args, side, workers))
    print(f"{args.rows:,} rows, {size / 1e6:.1f} MB; medians of {args.repeats}")
    print(f"{'':16}{'rows/s':>10}{'MB/s':>8}{'peak MiB':>10}{'packs':>8}")
    for (side, workers), runs in found.items():
        seconds, peak = (statistics.median(run[key] for run in runs) for key in ("seconds", "peak"))
        print(
            f"{side + f' {workers} proc':16}{args.rows / seconds:>10,.0f}{size / 1e6 / seconds:>8.2f}"
            f"{peak / 2**20:>10,.0f}{runs[0]['packs']:>8,}"
        )
    for workers in (1, 2):
        mine, other = ([run["seconds"] for run in found[side, workers]] for side in ("qlora", "trl"))
        print(f"{workers} proc: {statistics.median(other) / statistics.median(mine):.2f}x the rows a second of TRL")


if __name__ == "__main__":
    main()
