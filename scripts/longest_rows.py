"""Plan the longest row that fits: Llama-3-8B in 4 bit, rank 32, one row a micro-batch, every token trained.

    python scripts/longest_rows.py [--vram 23.5GiB] [--layers 32]

Computed, with kernels and without, layer inputs offloaded to CPU memory and not. No GPU and no weights are needed.
"""

import argparse

from transformers import LlamaConfig

from qlora import planner
from qlora.recipe import Lora, Quantization, parse_size
from qlora.recipe.sections import Model, Training


def longest(outline, budget_bytes, offload):
    """Return (tokens of the longest row that fits, its Plan), all layers checkpointed."""
    load = planner.Load(1, 1024, 1024, joined=outline.joins, document=1024)
    job = planner.Job(outline, load, Training(per_device_train_batch_size=1), budget_bytes, True, offload)
    tokens = planner.backwards(job)["max_length"]
    return tokens, planner.plan(planner.at_length(job, max(1, tokens)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vram", default="23.5GiB", type=parse_size)
    parser.add_argument("--layers", default=32, type=int)
    args = parser.parse_args()
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2**18,
    )
    config._attn_implementation = "sdpa"  # what a card has; without a card transformers takes another one
    model = Model(name_or_path="Llama-3-8B")
    print("kernels  offload   tokens  peak in")
    for kernels in ("auto", "off"):
        outline = planner.outline(config, model, Quantization(), Lora(r=32), 0, "cuda", False, kernels)
        for offload in (True, False):
            tokens, plan = longest(outline, args.vram, offload)
            print(f"{kernels:<8} {offload!s:<8} {tokens:>7,}  {plan.where}")


if __name__ == "__main__":
    main()
