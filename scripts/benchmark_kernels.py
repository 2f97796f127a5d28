"""What each kernel does to the speed of a training step, and to the memory that it keeps, alone and with all others.

    python scripts/benchmark_kernels.py --model FOLDER [--tokens 1024] [--rows 1] [--rounds 5]

One process, one model; each round takes a step of every variant in turn, after one that is not timed. Printed are the
median seconds and tokens/s of each, the bytes that autograd keeps for the backward pass, and the loss, which must not
change. Half of the positions are trained.
"""

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import torch

from qlora import base_model, kernels, methods
from qlora.kernels import attention
from qlora.recipe import Recipe
from qlora.system.quiet_libraries import hush_libraries
from qlora.training.objectives import supervised

ALL = dict(kernels._KINDS)
VARIANTS = {
    "off": (),
    "LoRA": ("lora",),
    "RMSNorm": ("rmsnorm",),
    "SwiGLU": ("lora", "swiglu"),
    "attention": ("attention",),
    "loss": ("loss",),
    "all": ("lora", "swiglu", "rmsnorm", "attention", "loss"),
}


@contextlib.contextmanager
def variant(model, names):
    """Compute with these kernels only; yield whether the loss is one of them."""
    kernels._KINDS = {kind: source for kind, source in ALL.items() if kind in names}
    with kernels.installed(model), attention.within_documents(model, plain="attention" not in names):
        yield "loss" in names


def step(model, inputs, lean):
    """Take a step; return (seconds, loss, bytes kept)."""
    kept = {}

    def note(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    device = model.device
    begin = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        if device.type == "cpu":
            loss = supervised.loss_of_trained_positions(model, inputs, None, lean)
        else:
            loss = model(**inputs, use_cache=False).loss
    loss.backward()
    value = loss.item()  # waits for a GPU
    seconds = time.perf_counter() - begin
    for parameter in model.parameters():
        parameter.grad = None
    return seconds, value, sum(kept.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    args = parser.parse_args()
    hush_libraries()
    recipe = Recipe.from_dict({"model": {"name_or_path": args.model}, "data": {"train": "none"}, "output_dir": "none"})
    model = base_model.load(base_model.find(recipe.model), recipe.model, recipe.quantization)
    model = methods.attach(model, recipe.lora).train()
    ids = torch.randint(
        10,
        min(10_000, model.config.get_text_config().vocab_size),
        (args.rows, args.tokens),
        generator=torch.Generator().manual_seed(0),
    ).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (len(row) // 2) + row[len(row) // 2 :]} for row in ids]
    inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in supervised.join_rows(rows).items()}
    found = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, names in VARIANTS.items():
            with variant(model, names) as lean:
                step(model, inputs, lean)
                found[name].append(step(model, inputs, lean))
    if args.json:
        keys = ("seconds", "loss", "kept_bytes")
        args.json.write_text(
            json.dumps({name: [dict(zip(keys, one, strict=True)) for one in steps] for name, steps in found.items()})
        )
    first = statistics.median(seconds for seconds, _, _ in found["off"])
    for name, steps in found.items():
        seconds = statistics.median(one[0] for one in steps)
        print(
            f"{name:12} {seconds:6.2f} s ({min(s[0] for s in steps):.2f}-{max(s[0] for s in steps):.2f})  "
            f"{args.rows * args.tokens / seconds:6.0f} tokens/s  x{first / seconds:.2f}  "
            f"kept {steps[0][2] / 2**20:6.0f} MiB  loss {steps[0][1]:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
