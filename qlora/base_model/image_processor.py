"""The image processor of a model folder: what makes the pixels that the model takes of an image, as its pipeline does.

transformers has two kinds, on torchvision and on Pillow, whose results differ in the last bits. Here it is Pillow's everywhere:
a run goes on the same on another machine, and torchvision is not needed. The file is the same for both.
"""

from __future__ import annotations

import hashlib
import json

import torch

from ..system import files
from ..system.errors import InputError
from .messages import said

FILE = "preprocessor_config.json"
_SIZES = ((40, 30), (30, 50))  # (width, height) of images that it is tried with


def load_image_processor(folder, section):
    """Return the image processor in `folder`.

    Raises:
        InputError: there is none, or it makes images of unlike size: a batch cannot be made of those.
    """
    from transformers import AutoImageProcessor

    if not (folder / FILE).is_file():
        raise InputError(
            f"{folder}: no {FILE}, which says how images are resized and normalized for this model; download it with the model"
        )
    files.read_object(folder / FILE)
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, backend="pil", trust_remote_code=section.trust_remote_code
        )
        shapes = [tuple(pixel_values(processor, [_blank(size)]).shape) for size in _SIZES]
    except Exception as error:  # it computes with what the file says
        raise InputError(f"{folder / FILE}: no usable image processor: {said(error)}") from None
    if shapes[0] != shapes[1] or len(shapes[0]) != 4:
        raise InputError(
            f"{folder / FILE}: images of {_SIZES[0]} and {_SIZES[1]} pixels become {shapes[0][1:]} and {shapes[1][1:]}, and a "
            "batch needs them alike; set do_resize with a height and a width, or do_center_crop"
        )
    return processor


def pixel_values(processor, images, dtype=None):
    """Return what the model takes of Pillow `images` in RGB: (B, channels, height, width), in `dtype` (None: float32)."""
    return processor(images=images, return_tensors="pt")["pixel_values"].to(dtype or torch.float32)


def image_shape(processor):
    """Return (channels, height, width) of what the processor makes of any image."""
    return tuple(pixel_values(processor, [_blank(_SIZES[0])]).shape[1:])


def refuse_other_shape(processor, config, folder):
    """Raise InputError if the processor makes images of another size, or with other channels, than the model takes."""
    made = image_shape(processor)
    taken = shape_of(config)
    if taken is not None and made != taken:
        raise InputError(
            f"{folder / FILE}: makes images of {_said(made)}, and config.json of the model is for {_said(taken)}; they do not "
            "belong together. Take the files of one model, or correct size (or crop_size)"
        )


def shape_of(config):
    """Return (channels, height, width) of the images that a model with this config takes; None where it does not say."""
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(config, "num_channels", 3), height, width


def in_words(processor):
    """Return what the processor does with an image, in words."""
    return f"{_said(image_shape(processor))}, by the model's own {type(processor).__name__.removesuffix('Pil')}"


def _said(shape):
    channels, height, width = shape
    return f"{width} x {height} pixels" + ("" if channels == 3 else f" in {channels} channels")


def identity(processor):
    """Return a hash of all that the processor's results depend on."""
    return hashlib.sha256(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode()).hexdigest()


def _blank(size):
    from PIL import Image

    return Image.new("RGB", size)
