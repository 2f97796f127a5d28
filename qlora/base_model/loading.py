"""Loads the weights of a checkpoint: frozen, in NF4 or in a plain dtype, every tensor accounted for."""

from __future__ import annotations

import torch

from ..system import memory
from ..system.errors import DoesNotFit, InputError
from . import tasks
from .attention_choice import refuse_missing
from .checks import refuse_incomplete, refuse_not_finite, refuse_rows_that_are_no_blocks
from .compute_dtype import of_model
from .config import config_of_files, load_config, read_config
from .messages import said
from .meta import load_on_meta, on_meta
from .new_tokens import add_rows
from .prequantized import refuse_other_codes, stored_quantization
from .quantized import DTYPE_WHEN_QUANTIZED, cast, dtype_of, quantized_modules
from .shares import taken


def load(checkpoint, section, quantization, device=None, dtype=None, share=None):
    """Return the frozen model of `checkpoint` in eval mode: NF4 under `quantization`, or plain if it is None.

    It computes in the dtype that these sections say (compute_dtype.py). dtype: what the files are read in; bfloat16 by
    default, and where it is given a plain model stays in it. share: the shares.Share that is kept of the codes; None: all.

    Where the files hold NF4 codes, the model has these, and of `quantization` only compute_dtype counts. It has a row for
    each of the checkpoint's new tokens; see `add_rows` for where these start.

    Raises:
        DoesNotFit: there is not enough memory.
        InputError: a weight is missing, left over or of another shape than the config says; names them.
    """
    device = torch.device(device or default_device())
    if device.type != "meta":
        refuse_missing(section.attn_implementation, device)
    num_rows = getattr(
        load_config(checkpoint, section).get_text_config(), "vocab_size", None
    )  # of images there is none
    config, bnb = read_config(checkpoint, section), None
    compute_dtype = of_model(section, quantization)
    is_given, dtype = dtype is not None, dtype or DTYPE_WHEN_QUANTIZED
    stored = stored_quantization(config)
    if stored:
        refuse_other_codes(checkpoint, on_meta(config, section.trust_remote_code))
        if device.type == "meta":  # transformers would read the codes
            return load_on_meta(config, section, quantization, dtype, codes=False)
        config.quantization_config = stored | {"bnb_4bit_compute_dtype": compute_dtype}
    elif quantization:
        bnb = _config_of(quantization, compute_dtype, _kept_whole(config, section))
    try:
        with memory.freed_at_once(), taken(share, checkpoint.folder if stored else None):
            model = _read(checkpoint, section, config, bnb, device, dtype)
    except InputError:
        raise
    except Exception as error:  # an architecture computes with what its config says, as in on_meta
        if memory.is_refusal(error):
            raise DoesNotFit(
                f"out of memory while {checkpoint.name_or_path} was loaded: {memory.refused(error)}\n  free some memory, use a "
                f"smaller model{'' if quantization else ', or leave out quantization: null'}"
            ) from None
        raise InputError(f"{checkpoint.folder}: cannot load the model: {said(error)}") from error
    tasks.of_model(model).accept_arguments(model)
    if stored:
        _settle_dtypes(model, dtype)
    if quantization or not is_given:
        cast(model, compute_dtype)
    if quantization and not quantized_modules(model):
        raise InputError(f"{checkpoint.folder}: no linear layer could be quantized; set quantization: null")
    refuse_rows_that_are_no_blocks(checkpoint, quantized_modules(model))
    for module in quantized_modules(model).values():
        # Without this, one forward in eval mode on an AVX512-BF16 host repacks the weight in place: from then on
        # gradients through the base are None and dequantize_4bit returns garbage (bitsandbytes 0.50.2).
        module.support_avx512bf16_for_cpu = False
    if checkpoint.new_tokens:
        add_rows(model, checkpoint.added, num_rows)
    model.requires_grad_(False)
    # what the files were called by the user, so that an adapter names a model and not a cache folder
    model.name_or_path = model.config._name_or_path = checkpoint.name_or_path
    return model.eval()


def _kept_whole(config, section):
    """Return the names of the modules that are not quantized; None for those that transformers leaves out itself, which is the
    head for words: of a classifier it knows the last layer alone."""
    task = tasks.of_config(config)
    return task.kept_names(on_meta(config, section.trust_remote_code)) if task.HAS_CLASSES else None


def _config_of(quantization, compute_dtype, kept):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.use_double_quant,
        bnb_4bit_compute_dtype=dtype_of(compute_dtype),
        llm_int8_skip_modules=kept,
    )


def _read(checkpoint, section, config, bnb, device, dtype):
    """Return transformers' model of the files; raises InputError unless these hold every weight, finite, and no other.

    bnb: a BitsAndBytesConfig, or None.
    """
    if device.type != "meta":  # where nothing is read
        refuse_not_finite(checkpoint, section)
    model, info = _from_pretrained(
        checkpoint,
        config=config,
        dtype=dtype,
        quantization_config=bnb,
        device_map={"": device},
        attn_implementation=None if section.attn_implementation == "auto" else section.attn_implementation,
        trust_remote_code=section.trust_remote_code,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # reported like the rest, below; nothing is let through
        output_loading_info=True,
    )
    task = tasks.of_model(model)
    refuse_incomplete(checkpoint, info, model, task)
    if device.type != "meta":
        task.begin_head(model, _new_head(checkpoint, section, info, model, task), checkpoint.task.seed)
    return model


def _new_head(checkpoint, section, info, model, task):
    """Return the names of the parameters that begin with random numbers: of a head that the files have none for, or one for
    other classes."""
    if not task.HAS_CLASSES:
        return set()
    labels = checkpoint.task.labels
    found = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if not labels or task.has_labels(config_of_files(checkpoint, section), labels):
        return found
    last = task.head_names(model)[-1]  # what stands before the logits is of use for other classes too
    return found | {name for name, _ in model.named_parameters() if name.startswith(f"{last}.")}


def _from_pretrained(checkpoint, config, **settings):
    """Return what from_pretrained of the task's class does; of a multimodal checkpoint, of its text half."""
    auto, half = tasks.of_config(config).auto_class(), checkpoint.half
    if half is None:
        return auto.from_pretrained(checkpoint.folder, config=config, **settings)
    model_class = auto._model_mapping[type(config)]
    with half.tensors(checkpoint) as tensors:
        model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **settings)
    model.generation_config = checkpoint.generation_config() or model.generation_config
    return model, info


def _settle_dtypes(model, dtype):
    """Let a model whose 4-bit weights were read as codes have the dtypes of one that was quantized when it was loaded.

    transformers 5.23 leaves whatever is called `weight` in the dtype of the file then, and casts biases.
    """
    in_float32 = model._keep_in_fp32_modules_strict or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if any(one in name for one in in_float32) else dtype)
    for module in quantized_modules(model).values():
        module.weight.quant_state.dtype = dtype  # in which dequantizing ends


def default_device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
