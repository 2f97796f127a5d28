"""A check that runs on a GPU: its time, its commands, its rows. scripts/gpu_check.py is what is checked."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


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


def finite(value):
    """Return a JSON value with None for what is no finite number."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
