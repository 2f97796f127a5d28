"""Images as a page shows them: small JPEGs within the page itself."""

from __future__ import annotations

from ..data import image

SHOWN = 48  # from all over the data, about 3 KB each
_SIDE = 96  # pixels


def thumbnail(example):
    """Return the image of a data.LabelledImage as a data: address of a small JPEG, about 3 KB."""
    with image.quiet():
        pixels = example.pixels()
    pixels.thumbnail((_SIDE, _SIDE))
    return f"data:image/jpeg;base64,{image.as_jpeg(pixels, quality=70)}"


def sizes_in_words(sizes):
    """Return what data.image_sizes found, in words."""
    width, height = sizes["width"], sizes["height"]
    if width["min"] == width["max"] and height["min"] == height["max"]:
        return f"all of {width['min']:,} x {height['min']:,} pixels"
    return (
        f"{width['min']:,} to {width['max']:,} pixels wide and {height['min']:,} to {height['max']:,} high, in the median "
        f"{width['p50']:,} x {height['p50']:,}"
    )
