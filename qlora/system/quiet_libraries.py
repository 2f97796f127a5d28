"""What the libraries print by themselves."""

import contextlib
import logging
import os
import sys
import threading
import warnings

_TALKATIVE = (
    "bitsandbytes",  # offers to download a CPU kernel
    "bitsandbytes.backends.cpu.ops",
    "torchao",  # its kernels for other cards, which cannot be loaded
    "torch.utils._pytree",  # how torchao 0.18 registers its enumerations
)

# what they read when they are imported
_SURROUNDINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


def hush_libraries(of_models=True):
    """Silence what the libraries print in every run: their bars, and warnings about their own future versions.

    Called by the command line, before they are imported. Errors, and warnings of other kinds, still show; downloads have bars.
    of_models: import those of models for that; False for a verb that does without them, and is there at once.
    """
    for name, value in _SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    _hush()
    if of_models:
        _hush_bars_of_models()
    if "datasets" in sys.modules:
        _hush_bars_of_datasets()


@contextlib.contextmanager
def hushed():
    """Do the same while the block runs, in a program of somebody else: afterwards they print as they did.

    What the libraries print is of the whole process: of blocks in several threads, the last to end restores it.
    """
    global _num_blocks
    with _lock:
        if not _num_blocks:
            _restored.enter_context(_hushed())
        _num_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _num_blocks -= 1
            if not _num_blocks:
                _restored.close()


_lock, _num_blocks, _restored = threading.Lock(), 0, contextlib.ExitStack()


@contextlib.contextmanager
def _hushed():
    from datasets.utils import are_progress_bars_disabled, enable_progress_bars
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels, verbosity = [logger.level for logger in loggers], transformers_logging.get_verbosity()
    had_bars, datasets_had_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    hub_had_bars = not hub.are_progress_bars_disabled()  # of downloads: the command line shows them
    with warnings.catch_warnings():
        try:
            _hush()
            _hush_bars_of_models()
            _hush_bars_of_datasets()
            transformers_logging.set_verbosity_error()
            hub.disable_progress_bars()
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if had_bars:
                transformers_logging.enable_progress_bar()
            if datasets_had_bars:
                enable_progress_bars()
            if hub_had_bars:
                hub.enable_progress_bars()


def _hush():
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate|torch)\.")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _hush_bars_of_models():
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _hush_bars_of_datasets():
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
