"""Compare training by qlora with the plain stack (TRL + PEFT + bitsandbytes), in turn, in one run.

    python scripts/benchmark_train.py --model FOLDER --data FILE [--steps 10] [--rounds 3] [--batch 8] [--packing 1024]

Both sides get the same NF4 base, rank, rows, batch and learning rate, and sound settings: bf16, adapters on all linear
layers, no dropout, the answer's tokens only. The plain side is what TRL does by itself with `peft_config` and a
prompt/completion data set. Each round runs both, in alternating order, each in a process of its own; printed are the
medians of tokens/s (padding not counted) over the steps after the first two, and their ratio. With --packing, qlora takes
one packed row of that many tokens a step.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def ours(args, folder):
    """Return one [tokens/s] a step, the losses and the peak bytes of qlora."""
    from qlora import Recipe, train

    run = train(
        Recipe.from_dict(
            {
                "model": {"name_or_path": args.model},
                "data": {"train": args.data, "max_length": args.packing or 1024, "packing": bool(args.packing)},
                "memory": {"gradient_checkpointing": args.checkpointing},
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
    records = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    return [r["tokens_per_second"] for r in records], [r["loss"] for r in records]


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
    rows = [formats.to_conversation(row.value)[1].messages for row in read]
    dataset = Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows])
    bnb = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, quantization_config=bnb)
    for module in base_model.quantized_modules(model).values():
        module.support_avx512bf16_for_cpu = False  # or it would lose its gradients, see qlora/base_model.py
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
        max_length=1024,
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
    return [float("nan"), *rates], losses


def child(args):
    """Run one side; print one JSON line: median tokens/s, losses, peak bytes."""
    from qlora import memory
    from qlora.commands.console import hush_libraries

    hush_libraries()
    if args.cap_gib:
        import torch

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(args.cap_gib * 2**30 / total)
    with tempfile.TemporaryDirectory() as folder:
        rates, losses = {"qlora": ours, "plain": plain}[args.side](args, Path(folder))
    print(json.dumps({"rate": statistics.median(rates[2:]), "losses": losses, "peak_bytes": memory.peak_bytes()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--packing", type=int, help="qlora packs to rows of this many tokens, one a step")
    parser.add_argument(
        "--cap-gib", type=float, help="let each side have this much GPU memory, to emulate a smaller card"
    )
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--side", choices=["qlora", "plain"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        child(args)
        return
    found = {"qlora": [], "plain": []}
    for number in range(args.rounds):
        for side in ("qlora", "plain") if number % 2 == 0 else ("plain", "qlora"):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            found[side].append(result)
            first, last = result["losses"][0], result["losses"][-1]
            print(
                f"round {number + 1}  {side:5}  {result['rate']:7.0f} tokens/s  loss {first:.4f} -> {last:.4f}",
                flush=True,
            )
    for key, unit, scale in (("rate", "tokens/s", 1), ("peak_bytes", "GiB", 2**30)):
        ours, theirs = (statistics.median(run[key] for run in found[side]) / scale for side in ("qlora", "plain"))
        print(f"median  {key}: qlora {ours:.4g}, plain {theirs:.4g} {unit}; ratio {ours / theirs:.2f}")


if __name__ == "__main__":
    main()
