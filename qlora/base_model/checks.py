"""What is refused of weights while they are loaded: non-finite, missing or left over, of a width that is computed wrongly."""

from __future__ import annotations

import re

from ..system.errors import InputError
from .config import read_config
from .folder import spellings
from .meta import on_meta


def refuse_not_finite(checkpoint, section):
    """Raise InputError if a weight in the files holds NaN or infinity; names the tensors.

    In the files, not in the model: the codes of a 4-bit weight cannot say so any more. What the architecture leaves in
    the files may be anything: GPT-NeoX's masked_bias of -1e9 is -inf in float16.
    """
    kept = set(checkpoint.half.kept) if checkpoint.half else set()
    wrong = {
        key: f"{key}: contains non-finite values ({name})"
        for name, facts in checkpoint.facts().items()
        for key in facts.not_finite
        if key not in kept
    }
    unused = _left_in_the_files(checkpoint, section, wrong) if wrong else set()
    problems = [problem for key, problem in wrong.items() if key not in unused]
    if problems:
        raise InputError.listing(
            f"{checkpoint.folder}: the weights are broken; the model", problems, "download it again"
        )


def _left_in_the_files(checkpoint, section, keys):
    """Return those of `keys`, names in the files, that the architecture knows and does not read."""
    model = on_meta(read_config(checkpoint, section), section.trust_remote_code)
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    read = model.state_dict().keys()
    return {
        key
        for key in keys
        if any(re.search(pattern, key) for pattern in patterns)
        and read.isdisjoint(spellings(key, model.base_model_prefix))
    }


def refuse_incomplete(checkpoint, info, model, task):
    """Raise InputError unless the files have every weight and no other, the head of a `task` with classes apart.

    info: what transformers says of the loading. task: a file such as text_generation.py.
    """
    missing = [key for key in sorted(info["missing_keys"]) if not task.is_of_head(model, key)]
    unused = [key for key in sorted(info["unexpected_keys"]) if not task.is_of_another_head(model, key)]
    problems = [f"missing: {key} (it would be filled with random numbers)" for key in missing]
    problems += [f"not used by this architecture: {key}" for key in unused]
    problems += [
        f"wrong shape: {key} is {tuple(found)} in the files, {tuple(expected)} by config.json"
        for key, found, expected in sorted(info["mismatched_keys"])
        if not task.is_of_head(model, key)
    ]
    if problems:
        raise InputError.listing(f"{checkpoint.folder}: config.json and the weights do not match; the model", problems)


def refuse_rows_that_are_no_blocks(checkpoint, modules):
    """Raise InputError where bitsandbytes would compute with wrong weights.

    It quantizes in blocks of 64 numbers that run on from row to row; on a CPU with AVX-512, 0.50.2 dequantizes as if each row
    began a block, and a run may go from any CPU to such a one. For rows of 96 numbers the result is 63 % off, where 4 bits
    cost 9 %, and nothing is said.
    """
    wrong = [
        f"{name}: {module.in_features} inputs"
        for name, module in modules.items()
        if module.weight.device.type == "cpu" and module.in_features % module.weight.blocksize
    ]
    if wrong:
        raise InputError.listing(
            f"{checkpoint.folder}: on a CPU, 4-bit layers need inputs in multiples of 64; the model",
            wrong,
            "set quantization: null, or use a GPU",
        )
