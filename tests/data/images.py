"""Images that tests make: a few colours and noise, so that a tiny model can tell the classes apart."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

COLOURS = {"blue": (30, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def picture(colour=(220, 50, 40), seed=0, size=(40, 32)):
    """Return an RGB image of `size` (width, height): a colour with noise of its own."""
    noise = np.random.default_rng(seed).integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


def encoded(image, kind="PNG", **options):
    """Return the bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def folder_of_classes(root, num_each=8, colours=COLOURS, kind="png", first=0):
    """Write `num_each` images a class into folders of `root`; return it."""
    for number, (name, colour) in enumerate(sorted(colours.items())):
        (root / name).mkdir(parents=True)
        for index in range(first, first + num_each):
            picture(colour, 1000 * number + index).save(root / name / f"{index}.{kind}")
    return root
