"""Opening pictures that nobody vetted."""

from __future__ import annotations

import functools
import io
import os

from PIL import Image, UnidentifiedImageError


# Of PIL's formats those that photographs come in. Some of the others run programs (EPS), and nobody vetted the files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")


# How the files of iPhones begin, after four bytes.
_HEIF_BRANDS = tuple(
    b"ftyp" + brand
    for brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
)


@functools.cache
def _readable_formats() -> tuple[str, ...]:
    """`FORMATS`, and HEIF if the package that reads it is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _is_heif(file: bytes | str | os.PathLike) -> bool:
    if not isinstance(file, bytes):
        with open(file, "rb") as opened:
            file = opened.read(12)
    return file[4:12] in _HEIF_BRANDS


def open_image(file: bytes | str | os.PathLike, max_pixels: int | None = None) -> Image.Image:
    """Reads a picture, all of it.

    Args:
        file (`bytes`, `str` or `os.PathLike`): An encoded picture in one of `FORMATS`, or the path of one; HEIC
            and HEIF too if pillow-heif is installed.
        max_pixels (`int`, *optional*): Of a larger picture nothing but the header is read.

    Returns:
        `PIL.Image.Image`: The picture in its own mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: In one line, why it cannot be decoded: another format, damage, or more pixels than `max_pixels`
            or `PIL.Image.MAX_IMAGE_PIXELS` allow.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_readable_formats())
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        image.load()
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        if _is_heif(file) and "HEIF" not in _readable_formats():
            raise ValueError("it is HEIC or HEIF, which needs a package: pip install pillow-heif") from None
        # PIL's message has the address of a buffer.
        raise ValueError(f"it is damaged, or none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        if max_pixels is None:
            raise ValueError(str(error)) from error
        raise ValueError(f"it is larger than {max_pixels / 1e6:g} megapixels, the most that is taken") from error
    except Exception as error:
        # Damaged files make PIL's decoders raise nearly anything.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return image
