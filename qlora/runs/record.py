"""What a run records as it goes: metrics.jsonl and TensorBoard events."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import Any

from transformers import TrainerCallback

from ..system.storage import write_text


class Recorder(TrainerCallback):
    """Writes metrics.jsonl and TensorBoard events, and hands each record on."""

    def __init__(self, trainer, run, listener):
        self.trainer, self.run, self.listener = trainer, run, listener
        self.file: Any = None  # until training begins: a run that is to go on is not changed before
        self.board: Any = None
        self.lines = self.last_tokens = 0
        self.seconds = 0.0  # of the run, before this process went on with it
        self.outside_seconds = 0.0  # of evaluations and checkpoints, in all of the run
        if trainer.resumed is not None:
            self.lines, self.seconds, self.last_tokens = (trainer.resumed[k] for k in ("lines", "seconds", "tokens"))
            self.outside_seconds = trainer.resumed["outside_seconds"]
        self.start = time.monotonic() - self.seconds
        self.last_time = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        from torch.utils.tensorboard import SummaryWriter

        resumed = self.trainer.resumed
        if resumed is not None:
            _cut(self.run.metrics_file, self.lines)
        self.file = open(self.run.metrics_file, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self.board = SummaryWriter(str(self.run.tensorboard), purge_step=resumed and resumed["step"] + 1)
        self.start, self.last_time = time.monotonic() - self.seconds, time.monotonic()

    def state(self):
        """Flush the records to disk and return the position where they end."""
        os.fsync(self.file.fileno())
        step = self.trainer.state.global_step
        return {
            "step": step,
            "lines": self.lines,
            "seconds": time.monotonic() - self.start,
            "outside_seconds": self.outside_seconds,
        }

    @contextlib.contextmanager
    def outside(self):
        """Exclude the time of the block (an evaluation, a checkpoint) from that of the steps."""
        start = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - start
            self.outside_seconds += seconds
            self.last_time += seconds

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._record(self._training_record(state, logs), state)
        elif "eval_loss" in logs:
            elapsed = time.monotonic() - self.start
            self._record(
                {"step": state.global_step, "epoch": state.epoch, "eval_loss": logs["eval_loss"], "time": elapsed},
                state,
            )

    def _training_record(self, state, logs):
        now, tokens = time.monotonic(), self.trainer.num_tokens()
        record = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": tokens,
            "tokens_per_second": (tokens - self.last_tokens) / max(now - self.last_time, 1e-9),
            "memory_bytes": self.trainer.peak.bytes,
            "time": now - self.start,
        }
        record |= self.trainer.trainable.schedule.measured()
        self.last_time, self.last_tokens = now, tokens
        return record

    def left_out(self, step, what, rows):
        """Record a skipped step. rows: their numbers, from 1."""
        state = self.trainer.state
        elapsed = time.monotonic() - self.start
        self._record({"step": step, "epoch": state.epoch, "not_taken": what, "rows": rows, "time": elapsed}, state)

    def _record(self, record, state):
        self.file.write(json.dumps(record, allow_nan=False) + "\n")
        self.file.flush()
        self.lines += 1
        for key in record.keys() - {"step", "epoch", "time", "not_taken", "rows"}:
            self.board.add_scalar(key, record[key], record["step"])
        if self.listener is not None:
            self.listener(record, state.max_steps)

    def close(self):
        if self.file is not None:
            self.file.close()
        if self.board is not None:
            self.board.close()


def _cut(path, num_lines):
    """Truncate a file to its first `num_lines` lines; the later ones will be computed again."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    write_text(path, "".join(lines[:num_lines]))
