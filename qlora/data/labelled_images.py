"""Rows of an image file and a label -> examples: where the file is, what it held, and a class; pixels are read when needed.

Each image is decoded once before training, so that a broken one is a bad row with its file and line; from then on its hash says
that it is still the same. What lies on disk is a path and a hash, not pixels: 224 x 224 of them are 150 KB.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from . import columns, image, image_files, labels
from .encoder import Encoded, Settings
from .image_files import IMAGE
from .message import kind_of

_NAMES = (IMAGE, labels.COLUMN)
_HASH = 32  # bytes of a sha256
KEPT_SIDE = 256  # pixels


@dataclass(frozen=True)
class LabelledImage:
    """path: of the file. digest: its sha256, 32 bytes. size: (width, height) in pixels, upright. label: number of the class."""

    path: str
    digest: bytes
    size: tuple
    label: int

    def pixels(self):
        """Return the image in RGB, upright; raises InputError where the file is not what it was."""
        return image.same(self.path, self.digest)


@dataclass(frozen=True)
class KeptImage:
    """An image that is kept in a run folder, without its file. jpeg: a small one, in base64. label: the number of the class."""

    jpeg: str
    label: int

    @classmethod
    def of(cls, example):
        """Return that of a LabelledImage, no larger than KEPT_SIDE."""
        with image.quiet():
            pixels = example.pixels()
        pixels.thumbnail((KEPT_SIDE, KEPT_SIDE))
        return cls(image.as_jpeg(pixels, quality=90), example.label)

    def pixels(self):
        """Return the image in RGB."""
        return image.of_jpeg(self.jpeg)


@dataclass(frozen=True)
class Said:
    """What a row says. name: of the file, from the folder of the data file; label: the name of a class, as in the row."""

    name: str
    label: str
    unused: tuple = ()


class LabelledImages:
    """The Encoder of image classification. settings.folder: what the paths in rows start from; settings.labels: the classes."""

    ARRAYS: ClassVar = {"file": "u1"}  # its hash and its name
    NUMBERS: ClassVar = {labels.COLUMN: "<i4", "width": "<i4", "height": "<i4"}
    COUNTS = ("images_rotated", "images_converted", "images_transparent", labels.BY_PLACE)
    LENGTH = 1

    open_source, not_read = staticmethod(image_files.open_source), staticmethod(image_files.not_read)

    def __init__(self, processor, settings: Settings):
        """processor: what will make the model's input of the pixels; examples do not depend on it."""
        self.settings = settings

    @staticmethod
    def refuse_columns(mapped):
        """See encoder.Encoder."""
        columns.refuse_other_names(mapped, _NAMES, "rows of images")

    @staticmethod
    def refuse_table(path, header, mapped, ignore):
        """See encoder.Encoder."""
        names = f"data.columns={{image: {header[0]}, label: {header[-1]}}}"
        remedy = f"Name those that hold the path of an image and its class: {names}"
        columns.refuse_missing(path, header, _mapping(mapped), remedy)

    def identity(self):
        return importlib.metadata.version("pillow")

    def read(self, value):
        """Return ("image", Said) of a row; raises ValueError for what is wrong with it."""
        if not isinstance(value, dict):
            raise ValueError(f"a row is an object with {IMAGE} and {labels.COLUMN}, not {kind_of(value)}")
        mapped = _mapping(self.settings.columns)
        row = columns.renamed(value, mapped)
        name = row[IMAGE]
        if isinstance(name, dict) and "bytes" in name:
            raise ValueError(f"{IMAGE} holds the bytes of an image; save it as a file, and give its path")
        if not isinstance(name, str):
            raise ValueError(f"{IMAGE} is {kind_of(name)}, not the path of a file")
        if not name.strip():
            raise ValueError(f"{IMAGE} is empty")
        if "://" in name or name.startswith("data:"):
            raise ValueError(f"{IMAGE} {name[:80]!r} is an address; download it, and give the path of the file")
        return IMAGE, Said(name, labels.said(row[labels.COLUMN]), columns.unused(value, mapped))

    def encode(self, value):
        kind, said = self.read(value)
        number = labels.number_of(said.label, self.settings.labels)
        path = Path(self.settings.folder) / said.name
        with image.quiet():
            found = image.opened(image.read(path), said.name)
        counts = {
            "images_rotated": int(found.rotated),
            "images_converted": int(found.converted),
            "images_transparent": int(found.transparent),
            labels.BY_PLACE: int(said.label not in self.settings.labels),
        }
        example = LabelledImage(said.name, found.digest, found.pixels.size, number)
        return Encoded(kind, image.key(found.pixels), [example], said.unused, counts)

    def stored(self, example):
        return (list(example.digest + os.fsencode(example.path)),), (example.label, *example.size)

    def restored(self, arrays, numbers):
        [file] = arrays
        name = os.fsdecode(file[_HASH:].tobytes())
        size = int(numbers["width"]), int(numbers["height"])
        path = str(Path(self.settings.folder) / name)
        return LabelledImage(path, file[:_HASH].tobytes(), size, int(numbers[labels.COLUMN]))


def _mapping(mapped):
    """Return {image and label: column}: those of data.columns, others by their own names."""
    return {IMAGE: IMAGE, labels.COLUMN: labels.COLUMN, **(mapped or {})}


def image_sizes(rows):
    """Return {"width", "height"}: {"min", "p50", "max"} of the images of `rows` (data.Rows), in pixels."""
    found = {}
    for side in ("width", "height"):
        pixels = np.sort(rows.numbers(side))
        found[side] = {"min": int(pixels[0]), "p50": int(pixels[len(pixels) // 2]), "max": int(pixels[-1])}
    return found


class Pixels:
    """Examples -> a batch: pixel_values (B, channels, height, width), as the model's own image processor makes them.

    to_tensor: (Pillow images) -> that tensor. Files are read by all cores: Pillow decodes without Python's lock.
    """

    counts = "images"

    def __init__(self, to_tensor):
        self.to_tensor = to_tensor

    def __call__(self, examples: Sequence[LabelledImage]):
        with image.quiet(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            pixels = list(pool.map(lambda example: example.pixels(), examples))
        return {"pixel_values": self.to_tensor(pixels)}
