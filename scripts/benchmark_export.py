"""Compare export with copying the file that it writes, and with PEFT's merge_and_unload, in turn, in one run.

    python scripts/benchmark_export.py --shape mistral-7b --tokenizer FOLDER --folder WORK [--rounds 3] [--peft]

A model of that shape with random weights is written shard by shard (scripts/random_model.py), and a random adapter of rank
16 on all linear layers. Each round, in alternating order: `qlora export --verify off` (read, quantize, dequantize, add, cast,
write, fsync), `cp` of what it wrote with fsync, and with --peft loading in bfloat16, merge_and_unload and save_pretrained.
Before each the files are put out of the page cache, so that every side reads from the disk.
Peak memory is the process' anonymous memory (RssAnon), seen every 10 ms from outside: pages of mapped and cached files are
not counted, since the system takes them back at will. Printed are medians and their ratios.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def random_adapter(base, folder, rank=16):
    """Write a PEFT adapter of this rank for every linear layer of the model in `base`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from qlora import base_model

    model = base_model.on_meta(AutoConfig.from_pretrained(base))
    tensors = {}
    for name in base_model.linear_names(model):
        layer = model.get_submodule(name)
        for factor, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            tensors[f"base_model.model.{name}.lora_{factor}.weight"] = torch.randn(shape, dtype=torch.bfloat16) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear",
              "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def put_out_of_the_cache(*folders):
    for path in [path for folder in folders for path in folder.glob("*.safetensors")]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def run(command):
    """Return (seconds, peak anonymous bytes) of a command; its output goes to stderr."""
    from qlora.system import memory

    start = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    peak = 0
    while process.poll() is None:
        if Path(f"/proc/{process.pid}").exists():
            peak = max(peak, anonymous(process.pid, memory))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
    return time.monotonic() - start, peak


def anonymous(process, memory):
    try:
        return memory.anonymous_bytes(process)
    except ProcessLookupError:
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for model, adapter and exports; kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--peft", action="store_true", help="PEFT's merge too; holds the whole model in memory")
    args = parser.parse_args()
    base, adapter = args.folder / args.shape, args.folder / f"{args.shape}-adapter"
    if not base.exists():
        script = Path(__file__).with_name("random_model.py")
        run([sys.executable, script, "--shape", args.shape, "--tokenizer", args.tokenizer, "--out", base])
    if not adapter.exists():
        random_adapter(base, adapter)

    out, copy = args.folder / "out", args.folder / "copy"
    sides = {
        "qlora": [sys.executable, "-m", "qlora", "export", adapter, "--model", base, "--out", out, "--verify", "off"],
        "cp": ["sh", "-c", f"mkdir '{copy}' && cp '{out}'/*.safetensors '{copy}' && sync -d '{copy}'/*"],
    }
    if args.peft:
        sides["peft"] = [sys.executable, "-c", PEFT, base, adapter, args.folder / "peft"]
    seconds, peaks = {side: [] for side in sides}, {side: [] for side in sides}
    report = {}
    for number in range(args.rounds):
        order = list(sides)
        # cp needs what qlora wrote; the two others change places from round to round
        for side in order if number % 2 == 0 else ["qlora", *reversed(order[1:])]:
            for folder in {"qlora": (out,), "cp": (copy,), "peft": (args.folder / "peft",)}[side]:
                shutil.rmtree(folder, ignore_errors=True)
            put_out_of_the_cache(base, out)
            took, peak = run(sides[side])
            seconds[side].append(took)
            peaks[side].append(peak)
            if side == "qlora":
                report = json.loads((out / "export_report.json").read_text())
            print(f"round {number + 1}  {side:5}  {took:6.1f} s  {peak / 2**30:5.2f} GiB", flush=True)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.rmtree(args.folder / "peft", ignore_errors=True)
    total = report["bytes"]
    if args.json:
        args.json.write_text(json.dumps({"bytes": total, "seconds": seconds, "peak_bytes": peaks}))
    print(f"\n{args.shape}, {total / 1e9:.1f} GB written")
    for side in sides:
        took = statistics.median(seconds[side])
        ratio = f"{took / statistics.median(seconds['cp']):.2f} x cp"
        print(f"{side:6} {took:7.1f} s  {total / took / 1e6:6.0f} MB/s  {max(peaks[side]) / 2**30:5.2f} GiB   {ratio}")
    print(f"qlora without starting Python: {report['write_seconds']:.1f} s in the last round")


if __name__ == "__main__":
    main()
