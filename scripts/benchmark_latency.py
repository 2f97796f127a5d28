"""How long an answer takes: of the base in NF4, of adapters on it, and of the merged model, in 16 bit and in NF4 again.

    python scripts/benchmark_latency.py --model FOLDER

Adapters have random numbers and every method's default layers; all lie on one base in memory, as in `qlora.open`. The merged
model is the base in 16 bit with the first adapter in its weights, and that quantized. Each round asks every side in turn, after
one that is not counted: a prompt of random tokens, greedy, through transformers' generate, as `qlora chat` does. Prints medians
of the time to the first token and of each further one, and their ratio to the base's; and how long a switch takes.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from qlora import base_model, methods
from qlora.evaluation.latency import seconds_of_answer
from qlora.methods.several import Several
from qlora.recipe import Adalora, Bottleneck, Hira, Ia3, Lora, Model, Oft, PromptTuning, Quantization
from qlora.system.quiet_libraries import hush_libraries

PAD = 0  # a token; nothing is padded
SECTIONS = {
    "lora": lambda rank: Lora(r=rank),
    "dora": lambda rank: Lora(r=rank, use_dora=True),
    "adalora": lambda rank: Adalora(init_r=rank, target_r=rank // 2),
    "ia3": lambda rank: Ia3(),
    "oft": lambda rank: Oft(),
    "hira": lambda rank: Hira(r=rank),
    "bottleneck": lambda rank: Bottleneck(size=rank),
    "prompt_tuning": lambda rank: PromptTuning(num_virtual_tokens=rank),
}


def write_adapter(checkpoint, section, folder):
    """Write an adapter with random numbers for the model of `checkpoint`, whose weights are not read."""
    model = base_model.on_meta(base_model.load_config(checkpoint, Model(name_or_path=str(checkpoint.folder))))
    attached = methods.attach(model, section)
    for module in attached.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                numbers = torch.randn(parameter.shape, dtype=torch.bfloat16) * 0.02
                setattr(module, name, torch.nn.Parameter(numbers))
    methods.save(attached, folder, checkpoint.folder, None)


@torch.no_grad()
def merged(checkpoint, folder):
    """Return the model of `checkpoint` in 16 bit with the adapter in `folder` in its weights."""
    model = base_model.load(checkpoint, Model(name_or_path=str(checkpoint.folder)), None)
    for name, update in methods.read(folder).updates.items():
        layer = model.get_submodule(name)
        weight = layer.weight.T if base_model.is_conv1d(layer) else layer.weight
        weight.copy_(update.merged(weight.float()))
    return model


def sides(args, folder):
    """Return ({side: choose() -> its model}, Several)."""
    section = Model(name_or_path=args.model)
    checkpoint = base_model.find(section)
    several = Several(base_model.load(checkpoint, section, Quantization()))
    found = {"base NF4": lambda: several.choose(None)}
    for name in args.methods:
        write_adapter(checkpoint, SECTIONS[name](args.rank), folder / name)
        several.load(name, folder / name)
        found[f"{name} on NF4"] = lambda name=name: several.choose(name)
    whole = merged(checkpoint, folder / args.methods[0])
    whole.save_pretrained(folder / "merged")
    section = Model(name_or_path=str(folder / "merged"))
    again = base_model.load(base_model.find(section), section, Quantization())
    return found | {"merged, 16 bit": lambda: whole, "merged, NF4 again": lambda: again}, several


def measure(choose, ids, args):
    """Return {side: [(seconds to the first token, seconds of each further one) of a round]}."""
    found = {side: [] for side in choose}
    for number in range(args.rounds + 1):
        for side, model in choose.items():
            first = seconds_of_answer(model(), ids, 1, PAD)
            rest = (seconds_of_answer(model(), ids, args.tokens, PAD) - first) / (args.tokens - 1)
            if number:
                found[side].append((first, rest))
    return found


def switch_seconds(several):
    """Return the median of a switch from one adapter to the next."""
    taken = []
    for name in several.names * 5:
        start = time.monotonic()
        several.choose(name)
        taken.append(time.monotonic() - start)
    return statistics.median(taken)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model folder or a hub name")
    parser.add_argument(
        "--methods", type=lambda text: text.split(","), default=list(SECTIONS), help="of: " + ", ".join(SECTIONS)
    )
    parser.add_argument("--rank", type=int, default=16, help="rank, size of the bottleneck, trained embeddings")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=17, help="new tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the numbers to this file")
    args = parser.parse_args()
    hush_libraries()
    with tempfile.TemporaryDirectory() as folder:
        choose, several = sides(args, Path(folder))
        device = several.base.device
        ids = torch.randint(10, 200, (1, args.prompt), generator=torch.Generator().manual_seed(0)).to(device)
        found = measure(choose, ids, args)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(
        f"{where}; {args.prompt} tokens in, {args.tokens} out, medians of {args.rounds} rounds in turn, ms (least-most)"
    )
    print(f"{'':22}{'first token':>24}{'ratio':>8}{'each further token':>24}{'ratio':>8}")
    medians = {
        side: [statistics.median(column) for column in zip(*rounds, strict=True)] for side, rounds in found.items()
    }
    base = medians["base NF4"]
    for side, rounds in found.items():
        cells = [
            f"{1e3 * median:>10.1f} ({1e3 * min(column):.1f}-{1e3 * max(column):.1f})".rjust(24)
            + f"{median / of:>8.2f}"
            for column, median, of in zip(zip(*rounds, strict=True), medians[side], base, strict=True)
        ]
        print(f"{side:22}{''.join(cells)}")
    switch = switch_seconds(several)
    print(f"a switch between adapters: {1e3 * switch:.2f} ms")
    if args.json:
        Path(args.json).write_text(json.dumps({"where": where, "seconds": found, "switch_seconds": switch}, indent=2))


if __name__ == "__main__":
    main()
