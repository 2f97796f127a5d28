"""Opening one image file: what is wrong with it is said before training, and what is right is as the pipeline sees it."""

import base64
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from qlora.data import image
from qlora.system.errors import InputError

from .images import encoded, picture


def refused(raw, name="a.png"):
    with pytest.raises(ValueError, match=r"a\.png") as caught:
        image.opened(raw, name)
    return str(caught.value)


def seen_by_pipeline(raw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.array(load_image("data:image/png;base64," + base64.b64encode(raw).decode()))


PALETTE = picture().quantize(16)
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = {
    "rgb": (picture(), {}),
    "greyscale": (picture().convert("L"), {}),
    "black_and_white": (picture().convert("1"), {}),
    "alpha": (picture().convert("RGBA"), {}),
    "palette": (PALETTE, {}),
    "transparent_palette": (PALETTE, {"transparency": bytes([0] + [128] * 15)}),
    "jpeg": (picture(), {"kind": "JPEG"}),
    "cmyk": (picture().convert("CMYK"), {"kind": "JPEG"}),
    "rotated": (picture(), {"kind": "JPEG", "exif": TURNED}),
    "webp": (picture(), {"kind": "WEBP"}),
    "one_pixel_high": (picture(size=(40, 1)), {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_what_the_pipeline_sees(kind):
    made, options = KINDS[kind]
    raw = encoded(made, **options)
    found = image.opened(raw, "a.png")
    assert found.pixels.mode == "RGB"
    assert np.array_equal(np.array(found.pixels), seen_by_pipeline(raw))
    assert found.rotated == (kind == "rotated")
    assert found.transparent == (kind in ("alpha", "transparent_palette"))
    assert found.converted == (kind in ("greyscale", "black_and_white", "palette", "transparent_palette", "cmyk"))


def test_a_rotated_image_is_upright():
    assert image.opened(encoded(picture(size=(40, 32)), "JPEG", exif=TURNED), "a").pixels.size == (32, 40)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_refused(kind, share):
    raw = encoded(picture(size=(64, 64)), kind)
    assert "cut off or broken" in (said := refused(raw[: int(share * len(raw))])) or "is not an image" in said


def test_a_claim_of_many_pixels_is_refused_without_making_them():
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def bomb(side):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")

    with image.quiet():
        assert "9,000 x 9,000 pixels" in refused(bomb(9_000))
        assert "9,500 x 9,500 pixels" in refused(bomb(9_500))  # where Pillow warns
        assert "more than 178,956,970 pixels" in refused(bomb(60_000))  # where Pillow refuses


def test_a_line_is_refused_before_a_processor_makes_it_large():
    assert "one side is over 100 times the other" in refused(encoded(picture(size=(500, 2))))


def test_16_bits_are_refused_because_a_conversion_cuts_them_off():
    raw = encoded(Image.fromarray((np.arange(1024).reshape(32, 32) * 60).astype(np.uint16)))
    assert (seen_by_pipeline(raw) == 255).mean() > 0.9
    assert "more than 8 bits a channel" in refused(raw)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind):
    raw = encoded(picture(), kind, save_all=True, append_images=[picture(seed=1), picture(seed=2)])
    assert "has 3 frames or pages" in refused(raw)


def test_a_camera_s_jpeg_with_a_preview_is_its_first_image():
    raw = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    assert np.array_equal(np.array(image.opened(raw, "a").pixels), seen_by_pipeline(raw))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
        (b"name,label\n", "is not an image"),
        (bytes(1000), "only zeros"),
    ],
)
def test_a_file_that_is_no_image_is_said_to_be_what_it_is(raw, said):
    assert said in refused(raw)


def test_what_is_read_of_a_path(tmp_path):
    path = tmp_path / "a.png"
    for broken, said in ((path, "no file at"), (tmp_path, "it is a folder")):
        with pytest.raises(ValueError, match=said):
            image.read(broken)
    path.write_bytes(encoded(picture()))
    digest = image.opened(image.read(path), "a").digest
    assert np.array_equal(np.array(image.same(path, digest)), np.array(picture()))
    path.write_bytes(encoded(picture(seed=1)))
    with pytest.raises(InputError, match="changed since"):
        image.same(path, digest)
    path.unlink()
    with pytest.raises(InputError, match="no file at"):
        image.same(path, digest)


def test_the_same_pixels_have_the_same_key_in_another_file():
    one, other = (image.opened(encoded(picture(), kind), "a").pixels for kind in ("PNG", "BMP"))
    assert image.key(one) == image.key(other) != image.key(picture(seed=1))
    assert image.key(Image.new("RGB", (8, 4))) != image.key(Image.new("RGB", (4, 8)))
