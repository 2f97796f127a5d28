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
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

from gpu_run import Check, Row
from gpu_setup import SHAPES, about, planned, prepare

RESOLUTION = 0.02  # of the longest row


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
    args = parser.parse_args()
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
