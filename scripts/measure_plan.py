"""The plan of trainings on a CPU beside what they hold: `qlora train` of small shapes, each in a process of its own.

    python scripts/measure_plan.py --tokenizer FOLDER --only gemma,llama
    python scripts/measure_plan.py --tokenizer FOLDER --smollm2 FOLDER

Random weights in the shapes of real models (scripts/random_model.py), with fewer layers where that changes nothing, and short
trainings on them. Prints a row each: the anonymous memory that loading and training added to the process, the plan's number, and
how far that is off.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).parent
GIB = 2**30
# {name: (shape, arguments of random_model.py)}; None: the folder given with --smollm2
MODELS = {
    "smollm2": None,
    "qwen": ("qwen2.5-0.5b", ("--layers", "6")),
    "gemma": ("gemma-3-270m", ()),
    "llama": ("llama-3.2-1b", ("--layers", "3")),
    "llama-untied": ("llama-3.2-1b", ("--layers", "3", "--untied")),
    "gemma-untied": ("gemma-3-270m", ("--layers", "6", "--untied")),
}
# {name: settings}: length and rows of a micro-batch, layers checkpointed
LOADS = {
    "128": ("data.max_length=128", "memory.gradient_checkpointing=false"),
    "512": ("data.max_length=512", "memory.gradient_checkpointing=false"),
    "1024": ("data.max_length=1024", "memory.gradient_checkpointing=false"),
    "1024c": ("data.max_length=1024", "memory.gradient_checkpointing=true"),
    "2048c": ("data.max_length=2048", "memory.gradient_checkpointing=true"),
}


def measure(settings):
    """Train, and print {"before", "loading", "training", "planned", "where", "components"}: bytes of anonymous memory."""
    from qlora.commands.train import train
    from qlora.jobs.opening import model_to_train
    from qlora.recipe import Recipe
    from qlora.system import memory

    seen = {}
    was, planned_was = model_to_train.open_trainable, sys.modules["qlora.commands.train"].plan_training

    def planning(*args):
        found = planned_was(*args)
        seen["before"] = memory.anonymous_bytes()  # what the plan itself has left is in predicted_bytes too
        seen.update(predicted=found.predicted_bytes, planned=found.plan.peak_bytes, where=found.plan.where,
                    components=found.plan.components)  # fmt: skip
        return found

    def opening(*args):
        with memory.Peak() as peak:
            found = was(*args)
        seen["loading"], seen["loaded"] = peak.bytes, memory.anonymous_bytes()
        return found

    model_to_train.open_trainable = opening
    sys.modules["qlora.commands.train"].plan_training = planning
    run = train(Recipe.from_dict({}, settings))
    measured = json.loads((run.path / "memory.json").read_text())
    seen["training"] = measured["peak_bytes"]
    print("MEASURED " + json.dumps(seen))


def one(model, load, folder):
    settings = [f"model.name_or_path={model}", f"data.train={folder / 'rows.jsonl'}", *LOADS[load]]
    settings += ["data.packing=true", "training.gradient_accumulation_steps=2", "training.max_steps=2"]
    settings += ["training.save_steps=null", f"output_dir={folder / 'run'}-{model.name}-{load}"]
    command = [sys.executable, __file__, "--measure", json.dumps(settings)]
    # this checkout, not what is installed
    paths = os.pathsep.join([str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": paths})
    lines = [line for line in done.stdout.splitlines() if line.startswith("MEASURED ")]
    if not lines:
        raise SystemExit(f"{model.name} {load}: {done.stdout}\n{done.stderr}")
    return json.loads(lines[0].removeprefix("MEASURED "))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="a model folder, whose tokenizer the shapes get")
    parser.add_argument("--smollm2", type=Path, help="its folder, to measure it too")
    parser.add_argument("--only", help="models, by comma")
    parser.add_argument("--loads", default=",".join(LOADS))
    parser.add_argument("--json", type=Path, help="append all numbers here, a line a training")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(json.loads(args.measure))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sys.path.insert(0, str(SCRIPTS))
        import quickstart_data

        quickstart_data.write(folder / "rows.jsonl", 400, 0, seed=1)
        print("model, load: loading, training, planned (GiB beside what the process had), planned / measured, where")
        for name in args.only.split(",") if args.only else MODELS:
            model = args.smollm2
            if MODELS[name] is not None:
                shape, more = MODELS[name]
                model = folder / name
                made = [sys.executable, SCRIPTS / "random_model.py", "--shape", shape, *more]
                subprocess.run(
                    [*made, "--tokenizer", args.tokenizer, "--out", model], check=True, stdout=subprocess.DEVNULL
                )
            if model is None:
                continue
            for load in args.loads.split(","):
                seen = one(model, load, folder)
                loading, training = (seen[key] - seen["before"] for key in ("loading", "training"))
                print(f"{name:13} {load:6} {loading / GIB:6.2f} {training / GIB:6.2f} {seen['planned'] / GIB:6.2f} "
                      f"{seen['planned'] / max(loading, training):6.2f}  {seen['where']}", flush=True)  # fmt: skip
                if args.json:
                    with open(args.json, "a", encoding="utf-8") as file:
                        file.write(json.dumps({"model": name, "load": load} | seen) + "\n")


if __name__ == "__main__":
    main()
