"""Everything that only a GPU can show, in one command, within a time limit: one JSON and one Markdown table.

    ./scripts/gpu_check.sh [--minutes 25] [--emulate-gib 23.5] [--folder runs/gpu-check]
    PYTHON=python3 ./scripts/gpu_check.sh      with the libraries that this Python has, tested versions or not

Most wanted first: qlora doctor; the tests that need CUDA; the peak that was planned against the measured one; tokens/s
against TRL + PEFT + bitsandbytes and, where it is installed, unsloth, in turn; the longest row that trains, by bisection
from what the plan says; each kernel; export. The model has the shape of a 7B, or of a smaller one where the card or the
disk has no room, random weights and a tokenizer of bytes: right for time and memory, not for losses. Nothing is
downloaded. A part that fails, or that the time was too short for, is a row that says why.

--emulate-gib: let torch have this much of the card (a 4090 has 23.5). A process can still see that more is free, so the same
number is passed on as the budget. Without it, the memory that is free is used, a desktop and all.

FOLDER/check.json and FOLDER/check.md are written after each row; FOLDER/logs has what each command printed.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
SHAPES = {"mistral-7b": 14.5e9, "llama-1b": 2.3e9, "tiny": 1e7}  # bytes of the weights; the first that fits is taken
RESOLUTION = 0.02  # of the longest row


@dataclass
class Row:
    """A line of the table. measured, compared: {side: number}, in `unit`; runs: {side: [least, most]}."""

    part: str
    case: str
    ok: bool = True
    why: str = ""
    unit: str = ""
    measured: float | None = None
    compared: dict = field(default_factory=dict)
    runs: dict = field(default_factory=dict)
    notes: str = ""


class Check:
    """A check that runs: its options, its time, its rows."""

    def __init__(self, args):
        self.args, self.rows, self.about = args, [], {}
        self.begun = time.monotonic()
        self.folder = args.folder.absolute()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        self.weights = self.shape = None
        self.no_model = ""

    def left(self):
        """Return the seconds that are left."""
        return 60 * self.args.minutes - (time.monotonic() - self.begun)

    def add(self, *rows):
        for row in rows:
            self.rows.append(row)
            print(f"{row.part:9} {row.case}: {row.notes or 'done' if row.ok else row.why}", flush=True)
        self.write()

    def write(self):
        found = {**self.about, "minutes": round((time.monotonic() - self.begun) / 60, 1), "shape": self.shape}
        found["rows"] = [asdict(row) for row in self.rows]
        partial = self.folder / "check.json.partial"
        partial.write_text(json.dumps(finite(found), indent=2) + "\n", encoding="utf-8")
        partial.replace(self.folder / "check.json")
        command = [sys.executable, SCRIPTS / "gpu_table.py", self.folder / "check.json"]
        table = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        (self.folder / "check.md").write_text(table, encoding="utf-8")

    def run(self, name, *command, share=1.0):
        """Run a command of this Python for a share of the time that is left; return (exit code, the last line it printed),
        or (None, that the time was over)."""
        log = self.folder / "logs" / f"{name}.log"
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        print(f"          {name} ...", flush=True)
        with open(log, "w", encoding="utf-8") as file:
            words = [sys.executable, *map(str, command)]
            code = limited(words, share * self.left(), file, os.environ | {"PYTHONPATH": paths})
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip()[:300] if lines else "nothing was printed"
        return code, "the time was over" if code is None else last

    def measure(self, name, script, *options, share=1.0):
        """Return (what a benchmark script wrote into its --json file, or {}; why it did not end well, or "")."""
        out = self.folder / "logs" / f"{name}.json"
        out.unlink(missing_ok=True)
        code, last = self.run(name, SCRIPTS / script, *options, "--json", out, share=share)
        found = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
        return found, "" if code == 0 else last

    def cap(self):
        """Return the options that emulate a smaller card; not more of it than is free."""
        return [] if self.args.emulate_gib is None else ["--cap-gib", f"{self.budget() / 2**30:.2f}"]

    def budget(self):
        """Return the bytes that a training may take."""
        emulated = self.args.emulate_gib
        free = self.about.get("free_bytes") or 24 * 2**30
        return free if emulated is None else min(free, emulated * 2**30)


def limited(command, seconds, output, environ):
    """Run a command; return its exit code, or None if it was ended, with all that it began, after so many seconds."""
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environ, start_new_session=True)
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:  # the time is over, or Ctrl-C came
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# ---- what there is -------------------------------------------------------------------------------------------------------


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
    code, last = check.run("describe", __file__, "--describe")
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


# ---- parts ---------------------------------------------------------------------------------------------------------------


def doctor(check):
    code, last = check.run("doctor", "-m", "qlora", "doctor", check.folder, "--json")
    text = (check.folder / "logs" / "doctor.log").read_text(encoding="utf-8")
    if code not in (0, 2) or "\n{" not in "\n" + text:
        return [Row("doctor", "all checks", False, last)]
    found = json.loads(text[("\n" + text).index("\n{") : text.rindex("}") + 1])["checks"]
    check.about["doctor"] = found
    wrong = [f"{one['name']}: {one['found']}" for one in found if not one["ok"]]
    return [Row("doctor", "all checks", not wrong, "; ".join(wrong), notes=f"{len(found)} ok")]


def cuda_tests(check):
    """The tests that are marked gpu."""
    loose = ["-o", "filterwarnings=default"] if check.about.get("outside_tested_range") else []
    code, last = check.run(
        "tests", "-m", "pytest", "-m", "gpu", "-q", *loose, *check.args.tests, "-p", "no:cacheprovider"
    )
    ran = code == 0 and "passed" in last
    return [Row("tests", "pytest -m gpu", ran, "" if ran else last, notes=last)]


def memory(check):
    """The peak that was planned, and what torch has held, at the most, of a few micro-batches."""
    tokens = check.args.tokens
    rows = {
        f"1 row of {tokens:,} tokens": ["--full-rows", tokens, "--batch", 1],
        "8 short rows": ["--data", check.folder / "rows.jsonl", "--batch", 8],
        f"1 row of {4 * tokens:,} tokens": ["--full-rows", 4 * tokens, "--batch", 1],
    }
    for number, (case, options) in enumerate(rows.items()):
        common = ["--model", check.weights, "--steps", 4, "--rounds", 1, "--only", "qlora", *check.cap()]
        found, why = check.measure(f"memory-{number}", "benchmark_train.py", *common, *options)
        yield memory_row(case, found, why)


def memory_row(case, found, why):
    runs = found.get("sides", {}).get("qlora")
    if not runs:
        failed = found.get("failed", {}).get("qlora", {}).get("error")
        return Row("memory", case, False, failed or why)
    one = runs[0]
    row = Row("memory", case, unit="GiB", measured=one["peak_bytes"] / 2**30)
    if one["predicted_bytes"]:
        row.compared = {"plan": one["predicted_bytes"] / 2**30}
    row.notes = (
        f"{one['checkpointed_layers']} of {one['layers']} layers checkpointed{', offloaded' if one['offload'] else ''}"
    )
    for key, words in (("reserved_bytes", "reserved by torch"), ("context_bytes", "beside torch")):
        if one.get(key) is not None:
            row.notes += f"; {one[key] / 2**30:.2f} GiB {words}"
    return row


def speed(check):
    """Tokens/s against the others: medians of runs in turn."""
    tokens, sides, why_not = check.args.tokens, "qlora,plain", unsloth_missing(check)
    if why_not:
        yield Row("speed", "unsloth", False, why_not)
    else:
        sides += ",unsloth"
    rows, packed = check.folder / "rows.jsonl", max(1024, 2 * tokens)  # a row has up to 830 tokens
    cases = {
        f"1 row of {tokens:,} tokens": ["--full-rows", tokens, "--batch", 1, "--sides", sides],
        "8 short rows, TRL pads": ["--data", rows, "--batch", 8],
        f"short rows packed to {packed:,} by both": [
            *("--data", rows, "--batch", 1),
            *("--packing", packed, "--plain-packing", packed),
        ],
    }
    for number, (case, options) in enumerate(cases.items()):
        if check.left() <= 0:
            yield Row("speed", case, False, "the time was over")
            continue
        common = [
            "--model",
            check.weights,
            "--steps",
            check.args.steps,
            "--rounds",
            check.args.rounds,
            "--checkpointing",
        ]
        options = [*common, "--unsloth-python", check.args.unsloth_python, *check.cap(), *options]
        found, why = check.measure(f"speed-{number}", "benchmark_train.py", *options, share=0.4)  # each has a turn
        yield from speed_rows(case, found, why)


def unsloth_missing(check):
    """Return why unsloth is not compared, or ""."""
    if not check.about.get("card"):
        return "needs a GPU"
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('unsloth') is None)"
    done = subprocess.run([check.args.unsloth_python, "-c", code])
    return "not installed" if done.returncode else ""


def speed_rows(case, found, why):
    """Return a Row of the rates, one of the peaks, and one for each side that failed."""
    sides = found.get("sides", {})
    rows = []
    for key, unit, scale, name in (("rate", "tokens/s", 1, case), ("peak_bytes", "GiB", 2**30, f"{case}: peak")):
        runs = {side: sorted(run[key] / scale for run in of if run[key]) for side, of in sides.items()}
        runs = {side: of for side, of in runs.items() if of}
        medians = {side: statistics.median(of) for side, of in runs.items()}
        if "qlora" in medians:
            others = {side: value for side, value in medians.items() if side != "qlora"}
            rounds = ", ".join(f"{side} {len(of)}" for side, of in runs.items())
            spread = {side: [of[0], of[-1]] for side, of in runs.items()}
            rows.append(Row("speed", name, True, "", unit, medians["qlora"], others, spread, f"runs: {rounds}"))
    rows += [Row("speed", f"{case}: {side}", False, one["error"]) for side, one in found.get("failed", {}).items()]
    if why and not found.get("failed"):
        rows.append(Row("speed", case if not rows else f"{case}: further rounds", False, why))
    return rows


def longest(check):
    """The longest row that trains, all layers checkpointed, without and with their inputs offloaded."""
    limit = json.loads((check.weights / "config.json").read_text())["max_position_embeddings"]
    for offload in ("no", "yes"):
        case = "longest row" + (", layer inputs offloaded" if offload == "yes" else "")
        if check.left() <= 0:
            yield Row("longest", case, False, "the time was over")
            continue
        settings = ["memory.gradient_checkpointing=true", f"memory.offload={offload == 'yes'}"]
        says = planned(check, check.weights, *settings)["limits"]["max_length"]

        def fits(tokens, offload=offload):
            options = ["--model", check.weights, "--full-rows", tokens, "--batch", 1, "--steps", 1, "--rounds", 1]
            options += ["--only", "qlora", "--offload", offload, *check.cap()]
            found, why = check.measure(f"longest-{offload}-{tokens}", "benchmark_train.py", *options)
            if found.get("sides", {}).get("qlora"):
                return True
            failed = found.get("failed", {}).get("qlora", {})
            if not failed.get("out_of_memory"):
                raise RuntimeError(failed.get("error") or why)
            return False

        yield longest_row(case, says, limit, *bisected(fits, min(says, limit), limit, lambda: check.left() > 0))


def longest_row(case, says, limit, good, bad, why):
    if good is None:
        return Row("longest", case, False, why or f"{bad:,} tokens do not fit")
    notes = f"{bad:,} do not fit" if bad else "the most that the model takes" if good >= limit else "no more was tried"
    notes = "; ".join(filter(None, [notes, why]))
    return Row("longest", case, unit="tokens", measured=good, compared={"plan": min(says, limit)}, notes=notes)


def bisected(fits, start, limit, has_time):
    """Return (the longest that fits, the shortest that does not, why no more was tried), None for what was not found.

    From `start`, up to `limit`, in steps of a fifth until both are known, then halved to RESOLUTION.
    """
    good, bad, tokens = None, None, max(1, start)
    try:
        while has_time():
            if fits(tokens):
                good = tokens
            else:
                bad = tokens
            if good is not None and (good >= limit or (bad is not None and bad - good <= max(1, RESOLUTION * good))):
                return good, bad, ""
            if bad is not None and bad <= 1:
                return None, bad, ""
            if bad is None:
                tokens = min(limit, math.ceil(1.2 * tokens))
            elif good is None:
                tokens = max(1, math.floor(tokens / 1.2))
            else:
                tokens = (good + bad) // 2
        return good, bad, "the time was over"
    except RuntimeError as error:
        return good, bad, f"{tokens:,} tokens: {error}"


def kernels(check):
    options = ["--model", check.weights, "--tokens", check.args.tokens, "--rounds", check.args.rounds]
    found, why = check.measure("kernels", "benchmark_kernels.py", *options)
    yield from kernel_rows(found, check.args.tokens)
    if why:
        yield Row("kernels", "all" if not found else "the rest", False, why)


def kernel_rows(found, tokens):
    seconds = {name: statistics.median(step["seconds"] for step in steps) for name, steps in found.items()}
    for name, steps in found.items():
        if name != "off":
            rates = {side: tokens / seconds[side] for side in (name, "off")}
            notes = f"keeps {steps[0]['kept_bytes'] / 2**20:.0f} MiB, off {found['off'][0]['kept_bytes'] / 2**20:.0f}"
            yield Row(
                "kernels", name, unit="tokens/s", measured=rates[name], compared={"off": rates["off"]}, notes=notes
            )


def export(check):
    """Of a shape that is already written; in seconds, so less is better."""
    work = check.folder / "export"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / check.shape).symlink_to(check.weights)
    options = ["--shape", check.shape, "--tokenizer", check.folder / "tokenizer", "--folder", work, "--rounds", 1]
    found, why = check.measure("export", "benchmark_export.py", *options)
    shutil.rmtree(work)  # twice the size of the model
    if why or not found:
        yield Row("export", check.shape, False, why)
        return
    seconds = {side: statistics.median(of) for side, of in found["seconds"].items()}
    notes = f"{found['bytes'] / 1e9:.1f} GB written, peak {max(found['peak_bytes']['qlora']) / 2**30:.2f} GiB"
    yield Row("export", check.shape, unit="s", measured=seconds["qlora"], compared={"cp": seconds["cp"]}, notes=notes)


PARTS = {"doctor": doctor, "tests": cuda_tests, "memory": memory, "speed": speed, "longest": longest, "kernels": kernels,
         "export": export}  # fmt: skip
NEED_NO_MODEL = {"doctor", "tests"}


def finite(value):
    """Return a JSON value with None for what is no finite number."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- all of it -----------------------------------------------------------------------------------------------------------


def checked(check, name):
    """Add the rows of a part; what it raises is a row too."""
    if check.left() <= 0:
        check.add(Row(name, "all", False, "the time was over"))
        return
    try:
        if name not in NEED_NO_MODEL:
            if check.weights is None and not check.no_model:
                prepare(check)
            if check.no_model:
                raise RuntimeError(f"no model: {check.no_model}")
        for row in PARTS[name](check):
            check.add(row)
    except Exception as error:  # the other parts go on
        check.add(Row(name, "all", False, f"{type(error).__name__}: {error}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25, help="time for all of it")
    parser.add_argument("--emulate-gib", type=float, help="have this much of the card, such as 23.5 for a 4090")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/gpu-check"), help="results, and 15 GB of random weights"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--shape", choices=["auto", *SHAPES], default="auto", help="default: the largest that fits")
    parser.add_argument("--tokens", type=int, default=2048, help="of a row; others are in proportion")
    parser.add_argument("--steps", type=int, default=8, help="of a timed run")
    parser.add_argument("--rounds", type=int, default=3, help="of timed runs")
    parser.add_argument("--tests", nargs="*", default=[], help="files of tests; default: all")
    parser.add_argument("--unsloth-python", default=sys.executable, help="a Python that has unsloth")
    parser.add_argument("--describe", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.describe:
        describe()
        return
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))}; known are {', '.join(PARTS)}")
    if args.minutes <= 0 or args.tokens < 16 or args.rounds < 1 or args.steps < 3 or (args.emulate_gib or 1) <= 0:
        parser.error("--minutes and --emulate-gib above 0, --tokens from 16, --rounds from 1, --steps from 3")
    check = Check(args)
    about(check)
    try:
        for name in PARTS:
            if name in args.parts.split(","):
                checked(check, name)
    except KeyboardInterrupt:
        print(f"\ninterrupted; what was measured is in {check.folder / 'check.md'}", file=sys.stderr)
        sys.exit(130)
    check.write()
    print(f"\n{check.folder / 'check.md'}, {check.folder / 'check.json'}")
    sys.exit(0 if all(row.ok for row in check.rows) else 1)


if __name__ == "__main__":
    main()
