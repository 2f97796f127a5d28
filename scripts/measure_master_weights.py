"""Measure what float32 master weights are worth: the same run with and without them, at several learning rates.

    python scripts/measure_master_weights.py --model FOLDER --data FILE [--steps 60] [--rates 1e-3 1e-4 1e-5]

Without them the optimizer steps the bf16 adapters themselves. Printed are the mean loss of the last ten steps, and the
share of the numbers in all A that differ from where they started.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

RATES = [1e-3, 1e-4, 1e-5]


class NoMasters:
    """Stands in for MasterWeights: gradients and steps in the model's own bf16."""

    def __init__(self, live, held=None):
        self.live = self.masters = live
        self.mine = list(range(len(live)))

    def take_gradients(self):
        pass

    def clip_gradients(self, most):
        import torch

        return torch.nn.utils.clip_grad_norm_(self.live, most)

    def give_weights(self):
        pass

    def clear_gradients(self):
        for parameter in self.live:
            parameter.grad = None


def run(args, learning_rate, masters):
    """Return (mean loss of the last ten steps, share of A that moved)."""
    import torch

    from qlora import Recipe, methods, train
    from qlora.runs import record
    from qlora.training import trained_parameters

    trained_parameters.MasterWeights = masters
    start = {}
    attach = methods.attach

    def remember(model, *sections, **more):
        model = attach(model, *sections, **more)
        if model.device.type == "meta":
            return model  # the plan's
        start.update({n: p.detach().clone() for n, p in model.named_parameters() if ".lora_A." in n})
        start["model"] = model
        return model

    methods.attach = remember
    with tempfile.TemporaryDirectory() as folder:
        finished = train(
            Recipe.from_dict(
                {
                    "model": {"name_or_path": args.model},
                    "data": {"train": args.data, "max_length": 1024},
                    "training": {
                        "max_steps": args.steps,
                        "per_device_train_batch_size": 8,
                        "gradient_accumulation_steps": 1,
                        "learning_rate": learning_rate,
                        "lr_scheduler_type": "constant",
                        "optim": "adamw_torch",
                    },
                    "output_dir": str(Path(folder) / "run"),
                }
            )
        )
        losses = [line.loss for line in record.read(finished) if isinstance(line, record.Step)]
    methods.attach = attach
    now = dict(start.pop("model").named_parameters())
    moved = statistics.mean((now[name] != value).to(torch.float32).mean().item() for name, value in start.items())
    return statistics.mean(losses[-10:]), moved


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    args = parser.parse_args()
    from qlora.system.quiet_libraries import hush_libraries

    hush_libraries()
    from qlora.training.master_weights import MasterWeights

    sides = (("float32 masters", MasterWeights), ("bf16 only", NoMasters))
    for learning_rate in args.rates:
        for name, masters in sides:
            loss, moved = run(args, learning_rate, masters)
            print(f"learning rate {learning_rate:.0e}  {name:15}  loss {loss:.4f}  A moved {moved:.1%}", flush=True)


if __name__ == "__main__":
    main()
