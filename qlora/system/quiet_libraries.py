"""What the libraries print by themselves."""

import logging
import os
import warnings


def hush_libraries():
    """Silence what the libraries print in every run: their bars, and warnings about their own future versions.

    Called by the command line, before they are imported. Errors, and warnings of other kinds, still show.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate|torch)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # offers to download a CPU kernel
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
