"""Print the tables of docs/scaling.md: a step of 64 rows of 2,048 tokens on 1 to 64 cards, by the plan. No GPU and no weights.

python scripts/scaling.py
"""

import json
import tempfile
from pathlib import Path

from qlora.jobs.planning.plan_job import Budget, computer_of
from qlora.jobs.planning.several_card_plans import jobs_of_cards
from qlora.planner import several_cards
from qlora.recipe import Recipe
from qlora.system.cards import card_of

GIB = 2**30
_LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8,
          "head_dim": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False}  # fmt: skip
MODELS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LINKS = {"PCIe 4.0 x8": 12.6e9, "100 Gb/s": 10e9, "10 Gb/s": 1e9}  # of a network: four fifths, as of PCIe


def jobs_of(shape, card, folder):
    """Return job(count, offload, link) -> planner.Job of a model of this shape, every layer checkpointed."""
    (folder / "config.json").write_text(json.dumps(_LLAMA | shape))
    recipe = Recipe.from_dict(
        {"model": {"name_or_path": str(folder)}, "data": {"train": "mine.jsonl"}, "output_dir": "runs/scaling", "lora": {},
         "memory": {"gradient_checkpointing": True},
         "training": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 64}}
    )  # fmt: skip
    return jobs_of_cards(recipe, None, Budget(card.memory, card.name, card), computer_of(card.name))


def main():
    card = card_of("3090")
    for name, shape in MODELS.items():
        with tempfile.TemporaryDirectory() as scratch:
            job = jobs_of(shape, card, Path(scratch))
            columns = [
                "GiB a card",
                "fits",
                "micro-batches",
                "sent a step, GB",
                "sending, s",
                "step, s",
                "tokens/s at most",
            ]
            print("\n|", " | ".join([name, "link", "way", *columns]), "|")
            print("|---|---|---|---|---|---|---|---|---|---|")
            alone = job(1)
            print_row(several_cards.way(alone), "")
            for count in (2, 4, 8, 16, 64):
                for link in ("PCIe 4.0 x8",) if count <= 8 else ("100 Gb/s", "10 Gb/s"):
                    for offload in (None, False, True):
                        print_row(several_cards.way(job(count, offload, LINKS[link])), link)


def print_row(way, link):
    plan = way.plan
    print(
        f"| {way.processes} | {link} | {way.name} | {plan.peak_bytes / GIB:.1f} | {'yes' if plan.fits else 'no'} | "
        f"{way.micro_batches} x {plan.tokens_per_micro_batch:,} | {way.sent_bytes / 1e9:.2f} | {way.communication_seconds:.2f} | "
        f"{way.step_seconds:.1f} | {way.tokens_per_second:,.0f} |"
    )


if __name__ == "__main__":
    main()
