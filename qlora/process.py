"""The process around a verb: its streams and signals; an error becomes one message and an exit code."""

from __future__ import annotations

import os
import sys
import traceback

from .system import launched
from .system.errors import SURROUNDINGS, DoesNotFit, InputError, Interrupted, QLoRAError
from .system.secrets import redacted
from .system.signals import handled
from .system.streams import Lasting


def run(app):
    """Run `app`, the command line, and exit with its code."""
    if sys.getfilesystemencoding() == "ascii":  # LC_ALL=C with PYTHONUTF8=0: no name with an umlaut could be opened
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    # None: this process was started without one
    sys.stdout, sys.stderr = (stream and Lasting(stream) for stream in (sys.stdout, sys.stderr))
    sys.excepthook = _show_bug
    with handled(leaves=True):
        _run(app)


def _show_bug(*bug):
    """Print the traceback of an exception, without the tokens that a library's message may hold."""
    print(redacted("".join(traceback.format_exception(*bug))), end="", file=sys.stderr)


def _run(app):
    try:
        os.getcwd()  # noqa: PTH109 (Path.cwd is the same)
    except OSError as error:
        _fail(f"the current directory: {error.strerror}; cd to a folder that exists", InputError.exit_code)
    try:
        app()
    except (QLoRAError, Interrupted) as error:
        if error.is_said or (error.is_said is None and not launched.is_first()):  # another process says it
            sys.exit(error.exit_code)
        if isinstance(error, Interrupted):
            _fail(error.message or f"{sys.argv[1]} interrupted; no partial output was left", error.exit_code)
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:
        if error.errno not in SURROUNDINGS:
            raise
        place = f"{error.filename}: {error.strerror}" if error.filename else error
        _fail(f"{place}; {SURROUNDINGS[error.errno]}", InputError.exit_code)
    except Exception as error:
        from .system.memory import is_refusal, refused

        if not is_refusal(error):
            raise
        remedy = "free some memory, or use fewer or shorter rows or a smaller model"
        _fail(f"out of memory: {refused(error)}\n  {remedy}", DoesNotFit.exit_code)


def _fail(message, code):
    message = f"qlora: {redacted(str(message))}"
    if sys.stderr is not None and sys.stderr.isatty():
        from .terminal.lines import folded

        message = folded(message)
    print(message, file=sys.stderr)
    sys.exit(code)
