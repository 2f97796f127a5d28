"""What the libraries print by themselves."""

import contextlib
import logging
import os
import sys
import warnings

_TALKATIVE = (
    "bitsandbytes",  # offers to download a CPU kernel
    "bitsandbytes.backends.cpu.ops",
    "torchao",  # its kernels for other cards, which cannot be loaded
    "torch.utils._pytree",  # how torchao 0.18 registers its enumerations
)

# what they read when they are imported: that a verb needs them is not for here to say, and takes seconds
_SURROUNDINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers goes by this too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
_READ_ONCE = {"huggingface_hub", "transformers", "datasets"}


def hush_libraries():
    """Silence what the libraries print in every run: their bars, and warnings about their own future versions.

    Called by the command line, before they are imported. Errors, and warnings of other kinds, still show.
    """
    for name, value in _SURROUNDINGS.items():
        os.environ.setdefault(name, value)
    if _READ_ONCE & sys.modules.keys():  # in a program that has imported them already
        _hush_bars()
    _hush()


@contextlib.contextmanager
def hushed():
    """Do the same while the block runs, in a program of somebody else: afterwards they print as they did."""
    from datasets.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels, verbosity = [logger.level for logger in loggers], transformers_logging.get_verbosity()
    had_bars, datasets_had_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        try:
            _hush()
            _hush_bars()
            transformers_logging.set_verbosity_error()
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if had_bars:
                transformers_logging.enable_progress_bar()
            if datasets_had_bars:
                enable_progress_bars()


def _hush():
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate|torch)\.")
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def _hush_bars():
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
