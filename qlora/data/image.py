"""One image file -> RGB pixels as `pipeline("image-classification")` sees them, or in words what is wrong with it.

Everything is found before training: Pillow raises a dozen kinds of errors for a broken file, most of them only when the pixels
are asked for, which would be hours into a run.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from ..system import files
from ..system.errors import InputError

# read with Pillow's own code; EPS would run Ghostscript, and of PSD, ICO and the like it is unclear which image is meant
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
LARGEST_FILE = 256 << 20  # bytes
MOST_PIXELS = 64 << 20  # 8,192 x 8,192; as RGB 192 MiB. A file of a few kilobytes may claim thousands of times as many
# of the longer side to the shorter: where a processor sets the shorter side, 10,000 x 1 would become 2,240,000 x 224
LONGEST_SHAPE = 100
_EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_ORIENTATION, _TURNED = 0x0112, range(2, 9)  # the EXIF tag, and its values that are not upright


class Opened(NamedTuple):
    """pixels: a Pillow image in RGB. digest: sha256 of the file, 32 bytes. The others: what was done to it."""

    pixels: Image.Image
    digest: bytes
    rotated: bool  # as its EXIF orientation says
    converted: bool  # from greyscale, a palette, CMYK
    transparent: bool  # its alpha was left out


@contextlib.contextmanager
def quiet():
    """Silence what Pillow says of files while the block runs: what matters of it is raised. Not for a thread beside others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read(path):
    """Return the bytes of an image file.

    Raises:
        ValueError: there is none, it cannot be read, or it is too large.
    """
    try:
        with files.open_file(path, "the image") as file:
            raw = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ValueError(f"no file at '{path}'") from None
    except InputError as error:
        raise ValueError(str(error)) from None
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror or error}") from None
    if len(raw) > LARGEST_FILE:
        raise ValueError(f"'{path}' is larger than {LARGEST_FILE >> 20} MiB")
    return raw


def opened(raw, name):
    """Return the Opened image that the bytes `raw` are. name: of the file, for messages.

    Raises:
        ValueError: what is wrong with it and what to do.
    """
    name = f"'{name}'"
    found, num_frames = _header(raw, name)
    refuse_shape(found, name)
    if num_frames > 1 and found.format != "MPO":  # a camera's JPEG with a preview behind it
        raise ValueError(f"{name} has {num_frames} frames or pages; save the one that the label is of")
    if found.mode not in _EIGHT_BITS:
        raise ValueError(
            f"{name} has more than 8 bits a channel (mode {found.mode}), which a conversion would cut off at white; save it "
            "with 8 bits"
        )
    transparent = found.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in found.info
    converted = found.mode not in ("RGB", "RGBA", "RGBX")
    try:
        found.load()
        rotated = found.getexif().get(_ORIENTATION) in _TURNED
        # as transformers' pipelines open it: upright, and without its alpha
        upright = ImageOps.exif_transpose(found)
        # the same colours: Pillow warns where it is left to do this itself
        pixels = (upright.convert("RGBA") if upright.mode == "P" and transparent else upright).convert("RGB")
    except MemoryError:
        raise ValueError(f"{name}: not enough memory for {found.width:,} x {found.height:,} pixels") from None
    except Exception as error:  # as above, and only now, when the pixels are read
        raise _broken(name, error) from None
    return Opened(pixels, hashlib.sha256(raw).digest(), rotated, converted, transparent)


def _header(raw, name):
    """Return (the image, of which only the header is read; how many frames it has)."""
    other = _kind(raw)
    instead = None if other else files.instead(raw[:512])
    if instead is not None:
        raise ValueError(f"{name} {instead}")
    try:
        found = Image.open(io.BytesIO(raw), formats=FORMATS)
        return found, getattr(found, "n_frames", 1)
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise ValueError(f"{name} says that it has more than {most:,} pixels; make it smaller") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} is not an image that can be read (PNG, JPEG, WebP, TIFF, ...){other}") from None
    except Exception as error:  # Pillow's readers raise struct.error, SyntaxError, OSError, ... for broken files
        raise _broken(name, error) from None


def _broken(name, error):
    said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return ValueError(f"{name} is cut off or broken: {said}; get the file again")


def refuse_shape(found, name):
    """Raise ValueError if an image, of which only the header need be read, has too many pixels, or is a line."""
    width, height = found.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"{name} has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}; make it smaller")
    if max(width, height) > LONGEST_SHAPE * min(width, height):
        raise ValueError(f"{name} has {width:,} x {height:,} pixels: one side is over {LONGEST_SHAPE} times the other")


def _kind(raw):
    """Return in words what else a file is that people take for images."""
    if raw[4:8] == b"ftyp" and raw[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return ": it is HEIC; save it as JPEG"
    if b"<svg" in raw[:512].lower():
        return ": it is SVG, which is no pixels; save it as PNG"
    return ""


def key(pixels):
    """Return 8 bytes, as an unsigned number, that are equal for images with the same pixels, whatever their files."""
    whole = hashlib.sha256(repr(pixels.size).encode())
    whole.update(pixels.tobytes())
    return int.from_bytes(whole.digest()[:8], "little")


def as_jpeg(pixels, quality):
    """Return a Pillow image as the bytes of a JPEG, in base64."""
    stream = io.BytesIO()
    pixels.save(stream, "JPEG", quality=quality)
    return base64.b64encode(stream.getvalue()).decode()


def of_jpeg(text):
    """Return the Pillow image that as_jpeg made a text of; raises ValueError if it is none."""
    return opened(base64.b64decode(text, validate=True), "image").pixels


def same(path, digest):
    """Return the RGB pixels of an image that was read before.

    Raises:
        InputError: the file is not what it was.
    """
    try:
        raw = read(path)
        if hashlib.sha256(raw).digest() == digest:
            return opened(raw, Path(path).name).pixels
        what = "changed since the data was read"
    except ValueError as error:
        what = str(error)
    raise InputError(f"{path}: {what}; restore it, or start a new run")
