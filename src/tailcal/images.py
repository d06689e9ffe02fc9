"""Decoding one image file of any size and kind into a square of bytes.

Only the six decoders of `FORMATS` are ever tried, whatever a file is called: none of them runs another program (the
decoder of PostScript would). Colour profiles are ignored. A damaged JPEG whose data stream is still complete decodes to
wrong pixels without a complaint from the library; every other damage is an error.
"""

import os
import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tailcal.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
EXTENSIONS = frozenset({".bmp", ".gif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
MAX_PIXELS = 64_000_000  # decoding takes 4 to 24 bytes a pixel (WebP), so at most about 1.6 gigabytes
MAX_ASPECT = 20  # a square cut out of a longer strip would show next to nothing of it
DRAFT = 2  # how many times too large a JPEG may be decoded when its own scaling by 1/2, 1/4 or 1/8 saves work

# A damaged EXIF block is a warning of Pillow's, and no reason to refuse the pixels. Filters belong to the process, and
# images are decoded in several of its threads: this one is set for good, and not around each image.
warnings.filterwarnings("ignore", module=r"PIL\.")


def shown(name: str | os.PathLike) -> str:
    """A file's name as an error line shows it: on one line, and in characters that every terminal takes."""
    text = os.fspath(name)
    return text if text.isprintable() else ascii(text)


def read_image(path: Path | str, size: int, channels: int) -> np.ndarray:
    """Decode a file into uint8 [size, size, channels]; `channels` is 3 (RGB) or 1 (grey, ITU-R 601 luma).

    In this order: the first frame or page; turned upright by its EXIF orientation; transparency over white; palette,
    CMYK, 1-bit and 16-bit (the high byte) converted; the shorter side resized to `size` (bilinear, antialiased), and
    the square in the middle cut out, which is torchvision's Resize(size) and CenterCrop(size) pixel for pixel. A JPEG
    that is far larger is first decoded at 1/2, 1/4 or 1/8 of its size, never below twice the target.

    A symbolic link is read as the file it leads to. Raises UserError, one line with the file's name and the reason,
    for a file that is missing, empty, no image, cut short or damaged, has more than `MAX_PIXELS` pixels, is more than
    `MAX_ASPECT` times longer than wide, or has 32-bit pixels, whose range is not defined.
    """
    path = Path(path)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError("is not a file")
        if not found.st_size:
            raise UserError("is empty (0 bytes)")
        return _decode(path, size, channels)
    except MemoryError:
        raise
    except Exception as error:  # decoders raise a different type for each way in which a file can be damaged
        raise UserError(f"{shown(path)}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "is missing"
    if isinstance(error, UnidentifiedImageError):
        return f"is not an image, or damaged at its beginning (must be {', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"has far more than {MAX_PIXELS:,} pixels, the limit"
    if isinstance(error, OSError) and error.errno:
        return f"cannot be read ({error.strerror})"
    return f"is damaged ({' '.join(str(error).split()) or type(error).__name__})"


def _decode(path: Path, size: int, channels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if min(width, height) < 1:
            raise UserError(f"is {width}x{height} pixels: there is nothing in it")
        if width * height > MAX_PIXELS:
            raise UserError(f"is {width}x{height} pixels: must be at most {MAX_PIXELS:,} in all")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise UserError(f"is {width}x{height} pixels: one side must be at most {MAX_ASPECT} times the other")
        if _tile(image) > MAX_PIXELS:
            raise UserError(f"has a tile of {_tile(image):,} pixels: must be at most {MAX_PIXELS:,}")
        image.draft(None, (DRAFT * size, DRAFT * size))  # does nothing to a file other than a JPEG
        ImageOps.exif_transpose(image, in_place=True)
        flat = _flatten(image).convert("RGB" if channels == 3 else "L")

    width, height = flat.size
    shorter = min(width, height)
    width, height = (size * width // shorter, size * height // shorter)
    flat = flat.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.array(flat.crop((left, top, left + size, top + size)), np.uint8).reshape(size, size, channels)


def _tile(image: "Image") -> int:
    """Pixels of one tile of a TIFF, which is decoded whole, however small the image is; 0 of anything else."""
    from PIL import TiffImagePlugin as Tiff

    if not isinstance(image, Tiff.TiffImageFile):
        return 0
    return image.tag_v2.get(Tiff.TILEWIDTH, 0) * image.tag_v2.get(Tiff.TILELENGTH, 0)


def _flatten(image: "Image") -> "Image":
    """The image as 8 bits a channel, L or RGB, without transparency."""
    from PIL import Image

    if image.mode in ("I", "F"):
        raise UserError("has 32-bit pixels: must be 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        if "transparency" in image.info:
            levels = np.where(levels == image.info["transparency"], 0xFFFF, levels)
        return Image.fromarray((levels >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
