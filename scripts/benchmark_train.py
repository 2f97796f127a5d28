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
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ours(args, folder):
    """Return tokens/s and loss of each step, the share of trained tokens, and the predicted peak of qlora."""
    from qlora import Recipe, train
    from qlora.runs import record

    run = train(
        Recipe.from_dict(
            {
                "model": {"name_or_path": args.model},
                "data": {
                    "train": args.data,
                    "max_length": args.packing or args.full_rows or 1024,
                    "packing": bool(args.packing),
                    "train_on": "all" if args.full_rows else "assistant",
                },
                "memory": {"budget": f"{args.cap_gib}GiB"} if args.cap_gib else {},
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
    )
    steps = [line for line in record.read(run) if isinstance(line, record.Step)]
    share = json.loads(run.data_report_file.read_text())["tokens"]
    return {
        "rates": [step.tokens_per_second for step in steps],
        "losses": [step.loss for step in steps],
        "trained_share": share["trained"] / share["total"],
        "predicted_bytes": json.loads(run.memory_file.read_text())["predicted_bytes"],
    }


def plain(args, folder):
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
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, quantization_config=bnb)
    for module in base_model.quantized_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # or it would lose its gradients, see base_model/loading.py
    rates, losses = [], []

    class Clock(TrainerCallback):
        tokens, last = 0, None

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                now = time.monotonic()
                if self.last is not None:
                    rates.append((logs["num_tokens"] - self.tokens) / (now - self.last))
                self.tokens, self.last = logs["num_tokens"], now
                losses.append(logs["loss"])

    config = SFTConfig(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        gradient_checkpointing=args.checkpointing,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=args.plain_packing or args.full_rows or 1024,
        packing=bool(args.plain_packing),
        use_cpu=not torch.cuda.is_available(),
        seed=42,
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.train()
    return {"rates": [float("nan"), *rates], "losses": losses}


def child(args):
    """Run one side; print one JSON line: median tokens/s, losses, the peak of anonymous memory."""
    from qlora.system import memory
    from qlora.system.quiet_libraries import hush_libraries

    hush_libraries()
    if args.cap_gib:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / total)
    with tempfile.TemporaryDirectory() as folder, memory.Peak() as peak:
        if args.full_rows:
            args.data = full_rows(args, Path(folder))
        found = {"qlora": ours, "plain": plain}[args.side](args, Path(folder))
    rate = statistics.median(found.pop("rates")[2:])
    print(json.dumps(found | {"rate": rate, "peak_bytes": peak.bytes}))


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


def main():
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
    parser.add_argument(
        "--only", choices=["qlora", "plain"], help="run this side alone, such as where the other does not fit"
    )
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto")
    parser.add_argument("--side", choices=["qlora", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if (args.data is None) == (args.full_rows is None):
        parser.error("give either --data or --full-rows")
    if args.side:
        child(args)
        return
    found = {"qlora": [], "plain": []}
    for number in range(args.rounds):
        sides = [args.only] if args.only else ["qlora", "plain"]
        for side in sides if number % 2 == 0 else reversed(sides):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found[side].append(result)
            first, last = result["losses"][0], result["losses"][-1]
            print(
                f"round {number + 1}  {side:5}  {result['rate']:7.0f} tokens/s  loss {first:.4f} -> {last:.4f}",
                flush=True,
            )
    if args.only:
        return
    share = found["qlora"][0]["trained_share"]
    print(
        f"trained  {share:.0%} of the tokens; predicted peak of qlora {found['qlora'][0]['predicted_bytes'] / 2**30:.2f} GiB"
    )
    for key, unit, scale in (("rate", "tokens/s", 1), ("peak_bytes", "GiB", 2**30)):
        sides = {side: sorted(run[key] / scale for run in found[side]) for side in ("qlora", "plain")}
        mine, theirs = (statistics.median(runs) for runs in sides.values())
        spread = ", ".join(f"{runs[0]:.4g}-{runs[-1]:.4g}" for runs in sides.values())
        print(f"median  {key}: qlora {mine:.4g}, plain {theirs:.4g} {unit} ({spread}); ratio {mine / theirs:.2f}")


if __name__ == "__main__":
    main()
