"""What scripts/gpu_check.py checks on: what there is, and a model of random weights that fits."""

import json
import os
import random
import shutil
import subprocess
import sys
import time

from gpu_run import ROOT, SCRIPTS, Row

SHAPES = {"mistral-7b": 14.5e9, "llama-1b": 2.3e9, "tiny": 1e7}  # bytes of the weights; the first that fits is taken


def describe():
    """Print one JSON line: versions, card, driver, commit; in a process of its own, whose CUDA context ends with it."""
    import importlib.metadata
    import platform

    from qlora.jobs.checks import device, versions

    outside = versions.outside()
    names = "torch transformers trl peft bitsandbytes accelerate datasets unsloth triton".split()
    found = {"versions": {"python": platform.python_version()}}
    for name in names:
        try:
            found["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["outside_tested_range"] = {name: f"{there}, tested: {wanted}" for name, (there, wanted) in outside.items()}
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "card": torch.cuda.get_device_name(),
            "total_bytes": total,
            "free_bytes": free,
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "driver": device.driver(),
            "cuda": torch.version.cuda,
        }
    else:
        import psutil

        free = psutil.virtual_memory().available
        found |= {"card": None, "cpu": platform.machine(), "cores": os.cpu_count(), "free_bytes": free}
    print(json.dumps(found))


def about(check):
    """Fill check.about."""
    check.about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": " ".join(["scripts/gpu_check.sh", *sys.argv[1:]]),
        "emulated_gib": check.args.emulate_gib,
    }
    code, last = check.run("describe", __file__)
    if code == 0:
        check.about |= json.loads((check.folder / "logs" / "describe.log").read_text().splitlines()[-1])
    else:
        check.add(Row("set-up", "versions and card", False, last))
    for name, text in check.about.get("outside_tested_range", {}).items():
        print(f"          {name} is outside the tested range: {text}", flush=True)


def commit():
    """Return the commit of this checkout, and whether files are changed; a question mark without git."""
    found = []
    for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "?"
        found.append(done.stdout.strip())
    return found[0] + (" and changes" if found[1] else "")


# ---- the model -----------------------------------------------------------------------------------------------------------


def make_tokenizer(folder):
    """Write a tokenizer with a token for each byte, and ChatML; nothing is downloaded."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {name: number for number, name in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template
    )
    made.save_pretrained(folder)


def write_rows(path, count=512):
    """Write short conversations of uneven length, about 110 tokens in the mean, as Alpaca's are."""
    words = random.Random(0)
    lines = []
    for _ in range(count):
        texts = [
            "".join(words.choices("abcdefgh ", k=min(400, round(words.lognormvariate(3.3, 0.6))))) + "." for _ in "qa"
        ]
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def planned(check, model, *overrides):
    """Return what `qlora plan --json` says of full rows on the memory that there is; raises RuntimeError with its message."""
    recipe = check.folder / "plan.yaml"
    recipe.write_text(
        f"model: {{name_or_path: {model}}}\ndata: {{train: {check.folder}/none.jsonl, train_on: all}}\n"
        f"training: {{per_device_train_batch_size: 1, gradient_accumulation_steps: 1, optim: adamw_torch}}\n"
        f"output_dir: {check.folder}/none\n"
    )
    vram = f"{check.budget() / 2**30:.2f}GiB"
    code, last = check.run("plan", "-m", "qlora", "plan", recipe, *overrides, "--vram", vram, "--json")
    text = (check.folder / "logs" / "plan.log").read_text(encoding="utf-8")
    if code not in (0, 3) or "\n{" not in "\n" + text:
        raise RuntimeError(last)
    return json.loads(text[("\n" + text).index("\n{") : text.rindex("}") + 1])


def prepare(check):
    """Choose a shape that fits the card and the disk, and write it; set check.shape and check.weights, or check.no_model."""
    try:
        choose(check)
    except Exception as error:  # not tried again
        check.no_model = str(error) or type(error).__name__


def choose(check):
    tokenizer = check.folder / "tokenizer"
    make_tokenizer(tokenizer)
    write_rows(check.folder / "rows.jsonl")
    why = []
    for shape, num_bytes in SHAPES.items():
        if check.args.shape not in ("auto", shape):
            continue
        size = ["--shape", shape, "--tokenizer", tokenizer, "--vocab-size", 32000 if num_bytes > 1e9 else 512]
        weights = check.folder / f"random-{shape}"
        if not weights.exists():
            free = shutil.disk_usage(check.folder).free
            if free < 1.2 * num_bytes:
                why.append(f"{shape} needs {num_bytes / 1e9:.0f} GB of disk, {free / 1e9:.0f} are free")
                continue
            outline = check.folder / f"outline-{shape}"
            shutil.rmtree(outline, ignore_errors=True)
            check.run(f"outline-{shape}", SCRIPTS / "random_model.py", *size, "--config-only", "--out", outline)
            if not planned(check, outline, f"data.max_length={check.args.tokens}")["fits"]:
                why.append(f"{shape} does not fit into {check.budget() / 2**30:.1f} GiB")
                continue
            partial = check.folder / f"random-{shape}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            code, last = check.run(f"random-{shape}", SCRIPTS / "random_model.py", *size, "--out", partial)
            if code != 0:
                raise RuntimeError(last)
            partial.rename(weights)
        check.shape, check.weights = shape, weights
        check.add(Row("set-up", "model", notes="; ".join([*why, f"random weights of the shape {shape}"])))
        return
    raise RuntimeError("; ".join(why) or "no shape")


if __name__ == "__main__":
    describe()
