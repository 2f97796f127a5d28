"""Training steps with OpenMP threads that spin while they wait, shortly or not at all; alone, and beside busy processes.

    python scripts/benchmark_threads.py [--busy 1] [--threads 2] [--rounds 3] [--steps 6] [--layers 4] [--tokens 512]

A process a measurement, in turn, of layers with SmolLM2-135M's shapes in bfloat16; prints the median seconds of a step and
how many times faster than by default that is.
"""

import argparse
import os
import statistics
import subprocess
import sys

# what libgomp, the OpenMP of torch's Linux wheels, is told; by itself it spins some 300,000 times before a thread sleeps
KINDS = {"default": {}, "short": {"GOMP_SPINCOUNT": "10000"}, "passive": {"OMP_WAIT_POLICY": "passive"}}
BUSY = "while True: pass"


def step_seconds(steps, layers, tokens, threads):
    """Return the median seconds of a forward and backward pass."""
    import time

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = LlamaForCausalLM(config).bfloat16()
    ids = torch.randint(0, 4096, (1, tokens))
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measured(settings, arguments):
    """Return step_seconds of a process of its own, with these environment variables."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"QLORA_BENCHMARK": "1", **settings}
    command = [sys.executable, __file__, *map(str, arguments)]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside")
    for name, default in (("threads", 2), ("rounds", 3), ("steps", 6), ("layers", 4), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    arguments = [args.steps, args.layers, args.tokens, args.threads]
    print("busy  " + "".join(f"{name:>10}  ratio" for name in KINDS))
    for num_busy in dict.fromkeys((0, args.busy)):
        busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(num_busy)]
        try:
            found = {name: [] for name in KINDS}
            for _ in range(args.rounds):
                for name, settings in KINDS.items():
                    found[name].append(measured(settings, arguments))
        finally:
            for process in busy:
                process.kill()
                process.wait()
        medians = {name: statistics.median(times) for name, times in found.items()}
        spread = "  ".join(f"{name} {min(times):.3f}-{max(times):.3f}" for name, times in found.items())
        columns = (f"{value:>10.3f}{medians['default'] / value:>7.2f}" for value in medians.values())
        print(f"{num_busy:<6}{''.join(columns)}   {spread}", flush=True)


if __name__ == "__main__":
    if os.environ.get("QLORA_BENCHMARK"):
        print(step_seconds(*map(int, sys.argv[1:])))
    else:
        main()
