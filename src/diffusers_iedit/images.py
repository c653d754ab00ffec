"""Opening pictures that nobody vetted."""

from __future__ import annotations

import io
import os

from PIL import Image, UnidentifiedImageError


# Of PIL's formats those that photographs come in. Some of the others run programs (EPS), and nobody vetted the files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")


def open_image(file: bytes | str | os.PathLike) -> Image.Image:
    """Reads a picture, all of it.

    Args:
        file (`bytes`, `str` or `os.PathLike`): An encoded picture in one of `FORMATS`, or the path of one.

    Returns:
        `PIL.Image.Image`: The picture in its own mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: In one line, why it cannot be decoded: another format, damage, or more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` allows.
    """
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        image.load()
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:
        # PIL's message has the address of a buffer.
        raise ValueError(f"it is damaged, or none of {', '.join(FORMATS)}") from None
    except Exception as error:
        # Damaged files make PIL's decoders raise nearly anything.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return image
