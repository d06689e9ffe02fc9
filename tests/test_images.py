"""Decoding single files: every kind, size and damage, against plain Pillow and torchvision calls."""

import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from torchvision.transforms import functional as tv

from tailcal import images
from tailcal.errors import UserError
from tailcal.images import read_image

GENERATOR = np.random.default_rng(3)


def smooth(width, height, channels=3):
    """An image whose four corners differ, without the noise that a lossy format would lose."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [x * 200 / width + 20, y * 200 / height + 20, (x / width + y / height) * 110]
    array = np.stack(planes[:channels], axis=-1).astype(np.uint8)
    return array if channels > 1 else array[..., 0]


def save(path, array, mode=None, **options):
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def naive(image, size, channels):
    """Resize(size) and CenterCrop(size) of torchvision."""
    square = tv.center_crop(tv.resize(image.convert("RGB" if channels == 3 else "L"), size), size)
    return np.asarray(square).reshape(size, size, channels)


@pytest.mark.parametrize(
    "shape", [(40, 40), (64, 41), (41, 64), (7, 5), (200, 11), (33, 32), (32, 33), (35, 32), (32, 35), (32, 32), (1, 1)]
)
@pytest.mark.parametrize("size", [1, 16, 32])
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_and_crop_are_torchvisions(tmp_path, shape, size, channels):
    pixels = GENERATOR.integers(0, 256, (*shape, 3), dtype=np.uint8)
    got = read_image(save(tmp_path / "a.png", pixels), size, channels)
    assert got.dtype == np.uint8
    assert got.shape == (size, size, channels)
    assert got.flags.c_contiguous
    assert (got == naive(Image.fromarray(pixels), size, channels)).all()


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.gif", "a.tif", "a.TIFF", "a.webp", "a.jpg", "ä b.JPEG"])
def test_every_format(tmp_path, name):
    lossy = {"quality": 95} if name.lower().endswith(("jpg", "jpeg")) else {"lossless": True} if "webp" in name else {}
    path = save(tmp_path / name, smooth(60, 40), **lossy)
    with Image.open(path) as image:
        assert (read_image(path, 16, 3) == naive(image, 16, 3)).all()
    error = np.abs(read_image(path, 16, 3).astype(int) - naive(Image.fromarray(smooth(60, 40)), 16, 3))
    assert error.max() <= (25 if name == "a.gif" else 4)  # a GIF has 256 colours


def test_the_ending_does_not_matter_but_the_content(tmp_path):
    (tmp_path / "a.jpg").write_bytes(save(tmp_path / "a.png", smooth(8, 8)).read_bytes())
    assert (read_image(tmp_path / "a.jpg", 8, 3) == smooth(8, 8)).all()


def test_large_jpegs_are_reduced_while_decoding_with_no_visible_difference(tmp_path, monkeypatch):
    path = save(tmp_path / "a.jpg", smooth(1600, 1200), quality=95)
    with Image.open(path) as image:
        full = naive(image, 64, 3).astype(int)
    sizes = []
    transpose = ImageOps.exif_transpose
    monkeypatch.setattr(
        ImageOps, "exif_transpose", lambda image, **options: (sizes.append(image.size), transpose(image, **options))
    )
    assert np.abs(read_image(path, 64, 3) - full).max() <= 2
    assert sizes == [(200, 150)]


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    grey = smooth(20, 20, 1)
    path = save(tmp_path / "grey.png", grey)
    assert (read_image(path, 20, 3) == grey[..., None]).all()
    assert (read_image(path, 20, 1)[..., 0] == grey).all()
    colour = smooth(20, 20)
    assert (read_image(save(tmp_path / "c.png", colour), 20, 1)[..., 0] == Image.fromarray(colour).convert("L")).all()


def test_palette_one_bit_and_cmyk(tmp_path):
    colour = Image.fromarray(smooth(20, 20))
    palette = save(tmp_path / "p.png", colour.quantize(16))
    assert (read_image(palette, 20, 3) == np.asarray(colour.quantize(16).convert("RGB"))).all()
    bits = smooth(20, 20, 1) > 100
    one = save(tmp_path / "1.png", Image.fromarray(bits))
    assert (read_image(one, 20, 1)[..., 0] == bits * 255).all()
    assert (read_image(one, 20, 3) == (bits * 255)[..., None]).all()
    for name in ("k.jpg", "k.tif"):
        cmyk = save(tmp_path / name, colour, "CMYK", **({"quality": 95} if name == "k.jpg" else {}))
        for channels, mode in ((3, "RGB"), (1, "L")):
            expected = np.asarray(colour.convert(mode)).reshape(20, 20, channels).astype(int)
            assert np.abs(read_image(cmyk, 20, channels) - expected).max() <= 12


def test_sixteen_bits_are_their_high_byte(tmp_path):
    levels = GENERATOR.integers(0, 1 << 16, (9, 9), dtype=np.uint16)
    for name in ("a.png", "a.tif"):
        path = save(tmp_path / name, Image.fromarray(levels))
        assert (read_image(path, 9, 1)[..., 0] == levels >> 8).all()
        assert (read_image(path, 9, 3) == (levels >> 8)[..., None]).all()
    path = save(tmp_path / "other_byte_order.tif", Image.fromarray(levels.astype(">u2")))
    assert (read_image(path, 9, 1)[..., 0] == levels >> 8).all()


def test_transparency_is_over_white(tmp_path):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:4], alpha[4] = 255, 128
    rgba = np.dstack([np.full((8, 8, 3), 40, np.uint8), alpha])
    got = read_image(save(tmp_path / "rgba.png", rgba), 8, 3)
    assert (got[:4] == 40).all()
    assert (got[4] == round(40 * 128 / 255 + 255 * 127 / 255)).all()
    assert (got[5:] == 255).all()
    for name in ("rgba.webp", "rgba.tif"):
        path = save(tmp_path / name, rgba, **({"lossless": True} if "webp" in name else {}))
        assert (read_image(path, 8, 3) == got).all()
    la = save(tmp_path / "la.png", Image.fromarray(rgba), "LA")
    assert (read_image(la, 8, 1) == got[..., :1]).all()
    palette = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8) % 2, (8, 1)), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for name in ("p.png", "p.gif"):
        got = read_image(save(tmp_path / name, palette, transparency=1), 8, 3)
        assert (got[:, 0::2] == [10, 20, 30]).all()
        assert (got[:, 1::2] == 255).all()
    keyed = Image.fromarray(np.array([[7, 300], [300, 7]], np.uint16))
    got = read_image(save(tmp_path / "key.png", keyed, transparency=300), 2, 1)[..., 0]
    assert got.tolist() == [[0, 255], [255, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, kind):
    """The stored pixels are turned the other way round, so all eight look the same upright."""
    upright = Image.fromarray(smooth(32, 24))
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    path = save(tmp_path / f"a.{kind}", stored, exif=exif, **options)
    assert np.abs(read_image(path, 24, 3) - naive(upright, 24, 3).astype(int)).max() <= (3 if kind == "jpg" else 0)


DAMAGED_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 20


def test_damaged_exif_does_not_matter(tmp_path):
    path = save(tmp_path / "a.jpg", smooth(20, 20), exif=DAMAGED_EXIF)
    assert np.abs(read_image(path, 20, 3) - smooth(20, 20).astype(int)).max() <= 12


def test_of_damaged_exif_nothing_is_said_in_any_thread(tmp_path):
    path = save(tmp_path / "a.jpg", smooth(20, 20), exif=DAMAGED_EXIF)
    code = (
        "import sys; from concurrent.futures import ThreadPoolExecutor; from pathlib import Path\n"
        "from tailcal.images import read_image\n"
        "with ThreadPoolExecutor(8) as readers:\n"
        "    list(readers.map(lambda _: read_image(Path(sys.argv[1]), 20, 3), range(200)))\n"
    )
    environment = {"PYTHONPATH": str(Path(images.__file__).parents[1])}
    ran = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, check=True)
    assert ran.stderr == b""


def test_no_warning_filter_changes_while_an_image_is_decoded(tmp_path, monkeypatch):
    """Filters belong to the process: of two threads, one would put back what the other had set."""
    path, before, decode = save(tmp_path / "a.png", smooth(8, 8)), list(warnings.filters), images._decode

    def look(*arguments):
        assert warnings.filters == before
        return decode(*arguments)

    monkeypatch.setattr(images, "_decode", look)
    read_image(path, 8, 3)


def test_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.abs(read_image(tmp_path / name, 8, 3) - np.array([255, 0, 0])).max() <= 3


def test_links_are_read_as_their_files(tmp_path):
    save(tmp_path / "a.png", smooth(8, 8))
    (tmp_path / "link.png").symlink_to("a.png")
    assert (read_image(tmp_path / "link.png", 8, 3) == smooth(8, 8)).all()


def fails(path, reason):
    with pytest.raises(UserError, match=f"^{re.escape(images.shown(path))}: .*{reason}") as caught:
        read_image(path, 8, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.gif", "a.bmp", "a.tif"])
def test_truncated_anywhere(tmp_path, name):
    noise = GENERATOR.integers(0, 256, (50, 50, 3), dtype=np.uint8)
    whole = save(tmp_path / name, noise).read_bytes()
    for share in (0.02, 0.3, 0.5, 0.8, 0.95):
        (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
        fails(tmp_path / name, "is (damaged|not an image)")


def test_damaged_inside(tmp_path):
    whole = bytearray(save(tmp_path / "a.png", smooth(50, 50)).read_bytes())
    whole[whole.index(b"IDAT") + 30] ^= 0xFF
    (tmp_path / "a.png").write_bytes(whole)
    fails(tmp_path / "a.png", "is damaged")


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_an_image_or_one_line(tmp_path, seed):
    generator = np.random.default_rng(seed)
    kind = ("png", "jpg", "webp", "gif", "bmp", "tif")[seed % 6]
    content = bytearray(save(tmp_path / f"a.{kind}", smooth(30, 30)).read_bytes())
    for place in generator.integers(0, len(content), 12):
        content[place] = generator.integers(256)
    (tmp_path / f"a.{kind}").write_bytes(content)
    try:
        assert read_image(tmp_path / f"a.{kind}", 8, 3).shape == (8, 8, 3)
    except UserError as error:
        assert "\n" not in str(error)


def test_what_is_no_image(tmp_path):
    (tmp_path / "empty.png").touch()
    fails(tmp_path / "empty.png", r"is empty \(0 bytes\)")
    (tmp_path / "text.jpg").write_text("<html>not found</html>")
    fails(tmp_path / "text.jpg", "is not an image")
    fails(tmp_path / "none.png", "is missing")
    fails(tmp_path / "text.jpg" / "x.png", "is missing")
    (tmp_path / "folder.png").mkdir()
    fails(tmp_path / "folder.png", "is not a file")
    os.mkfifo(tmp_path / "pipe.png")
    fails(tmp_path / "pipe.png", "is not a file")
    (tmp_path / "line\nbreak.png").write_text("x")
    fails(tmp_path / "line\nbreak.png", "is not an image")


def test_too_little_memory_is_no_damage_of_the_image(tmp_path, monkeypatch):
    def decode(*_):
        raise MemoryError

    monkeypatch.setattr(images, "_decode", decode)
    with pytest.raises(MemoryError):
        read_image(save(tmp_path / "a.png", smooth(8, 8)), 8, 3)


def test_other_decoders_are_never_tried(tmp_path):
    """Pillow hands PostScript to another program, which runs what is in it."""
    for kind in ("eps", "ppm", "ico"):
        stream = io.BytesIO()
        Image.fromarray(smooth(16, 16)).save(stream, kind)
        (tmp_path / "a.png").write_bytes(stream.getvalue())
        fails(tmp_path / "a.png", "is not an image")


def png(width, height):
    """The beginning of a PNG that promises this size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in (header, data)
    )


def test_bombs(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(8001, 8000))
    fails(path, r"is 8001x8000 pixels: must be at most 64,000,000 in all")
    path.write_bytes(png(10_000, 10_000))  # where Pillow itself only warns
    fails(path, "must be at most 64,000,000 in all")
    path.write_bytes(png(100_000, 100_000))
    fails(path, "has far more than 64,000,000 pixels")


def test_extreme_aspect(tmp_path):
    assert read_image(save(tmp_path / "a.png", smooth(20, 1)), 8, 3).shape == (8, 8, 3)
    fails(save(tmp_path / "b.png", smooth(21, 1)), "is 21x1 pixels: one side must be at most 20 times the other")
    fails(save(tmp_path / "c.png", smooth(1, 100)), "is 1x100 pixels")


def test_32_bit_pixels(tmp_path):
    fails(save(tmp_path / "f.tif", Image.new("F", (8, 8))), "has 32-bit pixels")
    fails(save(tmp_path / "i.tif", Image.new("I", (8, 8))), "has 32-bit pixels")
