"""Count what costs time on a GPU in a training step, where there is none: qlora and the plain stack (TRL + PEFT + bitsandbytes).

    python scripts/benchmark_counts.py --model FOLDER --data FILE [--micro-batches 4] [--batch 1]

The CPU poses as a GPU (pretended_cuda.py). Counted in the steps after the first: how often the host waits for the device in
a step; operations that would be launched, and weights that are dequantized, both divided by the decoder layers and the
micro-batches of a step, so with a share of what is beside the layers. Both sides get the same NF4 base, rows, rank and
optimizer, bf16 and sdpa, and all layers checkpointed or none. A step that is logged waits more often; none of these is.
Kernels of triton, and attention of several documents in one call, are counted as the torch operations that stand for them
here. A count is not a time.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import pretended_cuda


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="rows of `messages`")
    parser.add_argument("--batch", type=int, default=1, help="rows in a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    args = parser.parse_args()
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # threads do not share the mode that pretends
    pretended_cuda.install()
    print(f"{'':24} {'side':8} {'waits/step':>10} {'launches/layer':>15} {'dequantizations/layer':>22}")
    for checkpointed in (False, True):
        for name, side in (("plain", plain), ("qlora", ours)):
            with tempfile.TemporaryDirectory() as folder, pretended_cuda.active() as counts:
                seen = []
                layers, runs = side(args, Path(folder), checkpointed, lambda: seen.append(counts.snapshot()))  # noqa: B023
            first, last = seen[1], seen[-1]
            waits, _, launches, dequantized = ((b - a) / (len(seen) - 2) for a, b in zip(first, last, strict=True))
            each = layers * runs
            title = "all layers checkpointed" if checkpointed else "no layer checkpointed"
            print(f"{title:24} {name:8} {waits:10.0f} {launches / each:15.1f} {dequantized / each:22.1f}")


def ours(args, folder, checkpointed, note):
    """Train by qlora; calls note() after each step. Returns (decoder layers, micro-batches a step)."""
    from qlora import Recipe, train
    from qlora.training.objectives.supervised import Trainer

    layers, end_step = [], Trainer.end_step

    def noted(self, control):
        end_step(self, control)
        layers.append(self.model.config.num_hidden_layers)
        note()

    Trainer.end_step = noted
    try:
        train(
            Recipe.from_dict(
                {
                    "model": {"name_or_path": args.model},
                    "data": {"train": args.data, "max_length": args.max_length, "eval_fraction": 0.0},
                    "memory": {"gradient_checkpointing": checkpointed},
                    "training": {
                        "max_steps": 4,
                        "per_device_train_batch_size": args.batch,
                        "gradient_accumulation_steps": args.micro_batches,
                        "tokens_per_micro_batch": None,  # as many micro-batches as the other side
                        "logging_steps": 100,
                    },
                    "output_dir": str(folder / "run"),
                }
            )
        )
    finally:
        Trainer.end_step = end_step
    return layers[0], args.micro_batches


def plain(args, folder, checkpointed, note):
    """The same by TRL's SFTTrainer as its documentation puts it together."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from qlora import base_model
    from qlora.data import formats, sources
    from qlora.recipe import Model, Quantization, Source

    class Noted(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            note()

    read = (row for file in sources.open_source(Source(path=args.data)) for row in file.rows())
    rows = [formats.read(row.value)[1].messages for row in read]
    section = Model(name_or_path=args.model)
    # the weights as qlora reads them: NF4 in bitsandbytes' own layers, which is all there is of qlora in them
    model = base_model.load(base_model.find(section), section, Quantization())
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=args.micro_batches,
            gradient_checkpointing=checkpointed,
            optim="paged_adamw_8bit",
            bf16=True,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            max_length=args.max_length,
        ),
        train_dataset=Dataset.from_list([{"prompt": row[:-1], "completion": row[-1:]} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Noted()],
    )
    trainer.train()
    return model.config.num_hidden_layers, args.micro_batches


if __name__ == "__main__":
    sys.exit(main())
