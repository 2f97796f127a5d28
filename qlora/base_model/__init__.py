"""Name -> frozen base model in NF4 and its tokenizer. The dtype policy is here and nowhere else:

weight of every linear layer but the head   uint8 NF4 codes; per block of 64 an 8-bit absmax (double quantization)
every other parameter                       quantization.compute_dtype (by default bfloat16; without it float16 on a card,
                                            float32 on a processor),
                                            after it was rounded to bfloat16
buffers                                     as the architecture makes them (rotary frequencies are float32)
"""

from __future__ import annotations

from . import image_processor
from .attention_choice import OF_TORCH
from .compute_dtype import Computer, asked, computer, field, settle, settled
from .config import as_its_files_say, load_config, own_labels, read_config
from .empty_weights import is_stand_in, replace_by_stand_ins, stand_in
from .folder import Checkpoint, find, refuse_generation, tensor_names, weight_files
from .image_processor import load_image_processor, pixel_values
from .layers import decoder_layers, is_conv1d, linear_names, num_bytes, num_parameters, numel, tensors, tied, token_ends
from .limits import num_positions, refuse_rows, said_of_positions
from .loading import default_device, load
from .meta import load_on_meta, names_to_quantize, on_meta
from .multimodal import whole_config
from .new_tokens import add_rows, add_tokens, token_modules
from .prequantized import refuse_other_codes, stored_quantization
from .quantized import (
    DTYPE_WHEN_QUANTIZED,
    as_recorded,
    digest,
    digests,
    dtype_of,
    floating_dtype,
    quantized_modules,
    restore_codes,
    to_float32,
)
from .renamed import written_names
from .shares import Share, code_bytes, gather_in_layers, gathered, is_gathered
from .tasks import GENERATION, Task
from .tasks import of_folder as task_of_folder
from .tasks import of_model as task_of
from .tokenizer import follows_its_file, load_tokenizer, save_tokenizer, tokenizer_settings

__all__ = [
    "DTYPE_WHEN_QUANTIZED",
    "GENERATION",
    "OF_TORCH",
    "Checkpoint",
    "Computer",
    "Share",
    "Task",
    "add_rows",
    "add_tokens",
    "as_its_files_say",
    "as_recorded",
    "asked",
    "code_bytes",
    "computer",
    "decoder_layers",
    "default_device",
    "digest",
    "digests",
    "dtype_of",
    "field",
    "find",
    "floating_dtype",
    "follows_its_file",
    "gather_in_layers",
    "gathered",
    "image_processor",
    "is_conv1d",
    "is_gathered",
    "is_stand_in",
    "linear_names",
    "load",
    "load_config",
    "load_image_processor",
    "load_on_meta",
    "load_tokenizer",
    "names_to_quantize",
    "num_bytes",
    "num_parameters",
    "num_positions",
    "numel",
    "on_meta",
    "own_labels",
    "pixel_values",
    "quantized_modules",
    "read_config",
    "refuse_generation",
    "refuse_other_codes",
    "refuse_rows",
    "replace_by_stand_ins",
    "restore_codes",
    "said_of_positions",
    "save_tokenizer",
    "settle",
    "settled",
    "stand_in",
    "stored_quantization",
    "task_of",
    "task_of_folder",
    "tensor_names",
    "tensors",
    "tied",
    "to_float32",
    "token_ends",
    "token_modules",
    "tokenizer_settings",
    "weight_files",
    "whole_config",
    "written_names",
]  # fmt: skip
