"""Compare training by qlora with the plain stack (TRL + PEFT + bitsandbytes), in turn, in one run.

    python scripts/benchmark_train.py --model FOLDER --data FILE [--steps 10] [--rounds 3] [--batch 8] [--packing 1024]
    python scripts/benchmark_train.py --model FOLDER --full-rows 1024 --batch 1 --checkpointing

Both sides get the same NF4 base, rank, rows, batch and learning rate, and sound settings: bf16, adapters on all linear
layers, no dropout, sdpa, the answer's tokens only. The plain side is what TRL does by itself with `peft_config` and a
prompt/completion data set. Each round runs both, in alternating order, each in a process of its own; printed are the
medians of tokens/s (padding not counted) over the steps after the first two, of trained tokens/s, of the peak memory, and
their ratios. With --packing, qlora takes one packed row of that many tokens a step; with --plain-packing TRL packs too, by
"bfd". With --full-rows, rows are made of exactly that many tokens, every one trained. --checkpointing: the plain side
checkpoints all layers, as it must on a card that is full; qlora as many as its plan says.

With --sides qlora,plain,unsloth, unsloth runs too, with --full-rows only: it has its own way with prompts and answers. It
needs a GPU, and may be in another Python (--unsloth-python), since it wants other versions of transformers and trl. A side
that fails is said, and left out of the rounds after it. --json FILE has all numbers, written after each run.

What qlora computes in is its own choice (`compute_dtype: auto`), which is not bf16 on a processor or card without; the side
qlora-bfloat16 may not choose. Compare that with plain there, and with qlora to see what the choice is worth. plain-float32
is the plain stack with that choice made by hand: float32 in place of bf16, everywhere.

--clock cpu counts the seconds that a process computed (all its threads) in place of those that passed: on a CPU that others
use too, with OMP_NUM_THREADS=1.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def ours(args, folder, dtype="auto"):
    """Return tokens/s and loss of each step, the share of trained tokens, and the predicted peak of qlora."""
    from qlora import train
    from qlora.runs import record
    from qlora.system.events import heard_by

    clock, marks = CLOCKS[args.clock], []

    def hear(event):
        if isinstance(event, record.Step):
            marks.append((clock(), event.tokens))

    with heard_by(hear):
        run = train(recipe_of(args, folder, dtype))
    steps = [line for line in record.read(run) if isinstance(line, record.Step)]
    rates = [step.tokens_per_second for step in steps]
    if args.clock != "wall":
        rates = [None, *((b - a) / (end - start) for (start, a), (end, b) in itertools.pairwise(marks))]
    share = json.loads(run.data_report_file.read_text())["tokens"]
    measured = json.loads(run.memory_file.read_text())
    return {
        "rates": rates,
        "losses": [step.loss for step in steps],
        "trained_share": share["trained"] / share["total"],
        "predicted_bytes": measured["predicted_bytes"],
        "layers": measured["layers"],
        "checkpointed_layers": measured["checkpointed_layers"],
        "offload": measured["offload"],
    }


def ours_in_bfloat16(args, folder):
    return ours(args, folder, "bfloat16")


def recipe_of(args, folder, dtype):
    from qlora import Recipe

    return Recipe.from_dict(
        {
            "model": {"name_or_path": args.model},
            "quantization": {"compute_dtype": dtype},
            "data": {
                "train": args.data,
                "max_length": args.packing or args.full_rows or 1024,
                "packing": bool(args.packing),
                "train_on": "all" if args.full_rows else "assistant",
            },
            "memory": memory_section(args),
            "kernels": args.kernels,
            "training": {
                "max_steps": args.steps,
                "per_device_train_batch_size": 1 if args.packing else args.batch,
                "gradient_accumulation_steps": 1,
                "learning_rate": 1e-3,
                "warmup_ratio": 0.0,
                "optim": "adamw_torch",
            },
            "output_dir": str(folder / "run"),
        }
    )


def memory_section(args):
    """Return the recipe's section: a plan for the capped card, or layers as they are given, whatever a plan would say."""
    if args.offload is None:
        return {"budget": f"{args.cap_gib}GiB"} if args.cap_gib else {}
    return {"budget": "1000000GiB", "gradient_checkpointing": True, "offload": args.offload == "yes"}


def plain(args, folder, dtype="bfloat16"):
    """The same of TRL's SFTTrainer as its documentation puts it together."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from qlora import base_model
    from qlora.data import formats, sources
    from qlora.recipe import Source

    read = (row for file in sources.open_source(Source(path=args.data)) for row in file.rows())
    if args.full_rows:
        dataset = Dataset.from_list([{"text": row.value["text"]} for row in read])
    else:
        rows = [formats.read(row.value)[1].messages for row in read]
        dataset = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    bnb = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype), quantization_config=bnb)
    for module in base_model.quantized_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # or it would lose its gradients, see base_model/loading.py
    clock = clock_of(TrainerCallback, CLOCKS[args.clock])
    common = arguments(args, folder) | {"bf16": dtype == "bfloat16"}
    config = SFTConfig(**common, gradient_checkpointing=args.checkpointing)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    return {"rates": [None, *clock.rates], "losses": clock.losses}


def plain_in_float32(args, folder):
    return plain(args, folder, "float32")


def arguments(args, folder):
    """Return the arguments of SFTConfig that the other sides have in common."""
    import torch

    return {
        "output_dir": str(folder),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": args.plain_packing or args.full_rows or 1024,
        "packing": bool(args.plain_packing),
        "use_cpu": not torch.cuda.is_available(),
        "seed": 42,
    }


CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}


def clock_of(base, clock):
    """Return a callback of transformers' Trainer with `rates`, tokens/s of `clock` from the second step on, and `losses`."""

    class Clock(base):
        def __init__(self):
            self.rates, self.losses, self.tokens, self.last = [], [], 0, None

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                now, tokens = clock(), logs.get("num_tokens", state.num_input_tokens_seen)
                if self.last is not None:
                    self.rates.append((tokens - self.tokens) / (now - self.last))
                self.tokens, self.last = tokens, now
                self.losses.append(logs["loss"])

    return Clock()


def unsloth(args, folder):
    """The same by unsloth, as its documentation puts it together: rows of exactly --full-rows tokens."""
    os.environ |= {"UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(folder / "compiled")}
    from unsloth import FastLanguageModel  # before transformers and trl, which it changes

    import torch  # isort: skip
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        args.model, max_seq_length=args.full_rows, dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        bias="none",
        target_modules="q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split(),
        use_gradient_checkpointing="unsloth" if args.checkpointing else False,
    )
    clock = clock_of(TrainerCallback, CLOCKS[args.clock])
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments(args, folder), dataset_text_field="text", include_num_input_tokens_seen=True),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    return {"rates": [None, *clock.rates], "losses": clock.losses}


SIDES = {
    "qlora": ours,
    "qlora-bfloat16": ours_in_bfloat16,
    "plain": plain,
    "plain-float32": plain_in_float32,
    "unsloth": unsloth,
}


def child(args):
    """Run one side; print one JSON line: median tokens/s, losses, the peak of memory; or {"error", "out_of_memory"}."""
    before = card_bytes()
    import torch

    from qlora.system import memory

    try:
        found = measured(args, memory)
    except Exception as error:  # the others go on
        traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        out_of_memory = memory.is_refusal(error) or type(error).__name__ == "DoesNotFit"
        print(json.dumps({"error": text, "out_of_memory": out_of_memory}))
        return
    if torch.cuda.is_available():
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        if (
            before is not None
        ):  # what the driver and the libraries hold beside torch, and what it keeps without using it
            found["context_bytes"] = max(0, total - free - before - torch.cuda.memory_reserved())
    print(json.dumps(found))


def measured(args, memory):
    import torch

    if args.side != "unsloth":
        from qlora.system.quiet_libraries import hush_libraries

        hush_libraries()
    if args.cap_gib and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.cap_gib * 2**30 / total))
    with tempfile.TemporaryDirectory() as folder, memory.Peak() as peak:
        if args.full_rows:
            args.data = full_rows(args, Path(folder))
        found = SIDES[args.side](args, Path(folder))
    rates = [rate for rate in found.pop("rates")[2:] or [] if rate is not None]
    return found | {"rate": statistics.median(rates) if rates else None, "peak_bytes": peak.bytes}


def card_bytes():
    """Return the bytes of the GPU that are held now, by all processes, as its driver says; None without nvidia-smi."""
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={number}"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def full_rows(args, folder):
    """Write rows of exactly so many tokens, words drawn at random by a fixed seed; return the file."""
    from transformers import AutoTokenizer

    tokenizer, words = AutoTokenizer.from_pretrained(args.model), random.Random(0)
    lines = []
    for _ in range(args.steps * args.batch):
        text = " ".join(
            "".join(words.choices("abcdefghijklmnopqrstuvwxyz", k=words.randint(1, 8))) for _ in range(args.full_rows)
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids[: args.full_rows - 1]  # and the end
        lines.append(json.dumps({"text": tokenizer.decode(ids)}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data")
    parser.add_argument("--full-rows", type=int, metavar="TOKENS", help="make rows of this many tokens, all trained")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--packing", type=int, help="qlora packs to rows of this many tokens, one a step")
    parser.add_argument(
        "--cap-gib", type=float, help="let each side have this much GPU memory, to emulate a smaller card"
    )
    parser.add_argument("--plain-packing", type=int, help="TRL packs to rows of this many tokens")
    parser.add_argument("--checkpointing", action="store_true", help="the plain side checkpoints all layers")
    parser.add_argument("--offload", choices=["yes", "no"], help="qlora checkpoints all layers, and does not plan")
    parser.add_argument("--sides", default="qlora,plain", help=f"of {', '.join(SIDES)}; in this order")
    parser.add_argument("--only", choices=SIDES, help="run this side alone, such as where the other does not fit")
    parser.add_argument("--unsloth-python", default=sys.executable, help="a Python that has unsloth")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.sides = [args.only] if args.only else args.sides.split(",")
    if (args.data is None) == (args.full_rows is None):
        parser.error("give either --data or --full-rows")
    if not set(args.sides) <= set(SIDES):
        parser.error(f"--sides: known are {', '.join(SIDES)}")
    if "unsloth" in args.sides and not args.full_rows:
        parser.error("unsloth is compared on --full-rows only")
    return args


def run_side(args, side):
    """Return what `child` printed for a side, in a process of its own."""
    python = args.unsloth_python if side == "unsloth" else sys.executable
    root = str(Path(__file__).parents[1])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [python, __file__, *sys.argv[1:], "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": paths})
    with contextlib.suppress(IndexError, ValueError):
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": f"ended with {done.returncode}", "out_of_memory": False}


def main():
    args = parsed()
    if args.side:
        child(args)
        return
    found, failed = {side: [] for side in args.sides}, {}
    for number in range(args.rounds):
        for side in args.sides if number % 2 == 0 else reversed(args.sides):
            if side in failed:
                continue
            result = run_side(args, side)
            if "error" in result:
                failed[side] = result
                print(f"round {number + 1}  {side:15}  failed: {result['error']}", flush=True)
            else:
                found[side].append(result)
                first, last, rate = result["losses"][0], result["losses"][-1], result["rate"] or float("nan")
                print(f"round {number + 1}  {side:15}{rate:7.0f} tokens/s  loss {first:.4f} -> {last:.4f}", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"sides": found, "failed": failed}))
    show(found)
    if failed:
        sys.exit(1)


def show(found):
    if found.get("qlora"):
        one = found["qlora"][0]
        planned = "no plan" if one["predicted_bytes"] is None else f"{one['predicted_bytes'] / 2**30:.2f} GiB"
        print(f"trained  {one['trained_share']:.0%} of the tokens; predicted peak of qlora {planned}")
    for key, unit, scale in (("rate", "tokens/s", 1), ("peak_bytes", "GiB", 2**30)):
        runs = {side: sorted(run[key] / scale for run in of if run[key]) for side, of in found.items()}
        runs = {side: of for side, of in runs.items() if of}
        medians = {side: statistics.median(of) for side, of in runs.items()}
        text = ", ".join(f"{side} {medians[side]:.4g} ({of[0]:.4g}-{of[-1]:.4g})" for side, of in runs.items())
        others = [side for side in medians if side != "qlora" and "qlora" in medians]
        ratios = ", ".join(f"{medians['qlora'] / medians[side]:.2f} of {side}" for side in others)
        print(f"median  {key}: {text} {unit}" + (f"; qlora is {ratios}" if ratios else ""))


if __name__ == "__main__":
    main()
