"""Masks of a set that somebody else made, whatever marks the edit in them, and what differs between two pictures."""

from __future__ import annotations

import re

import numpy as np
from PIL import Image
from scipy import ndimage


SAME_ASPECT = 0.02
"""Two pictures whose aspect ratios differ by less, relatively, show the same frame."""

# Levels of 255: below the first, nothing is seen to change; what changes is somewhere above the second.
_LOWEST, _HIGHEST = 8, 24

_NOISE_LEVELS = 5
"""How many standard deviations of the noise a change stands out by."""

_SMALLEST_PART = 0.0005
"""The share of a picture below which what differs is a speck."""


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes, in pixels, are those of one frame."""
    return abs(size[0] * other[1] / (size[1] * other[0]) - 1) < SAME_ASPECT


def decode_runs(runs: list[int] | str, size: tuple[int, int]) -> np.ndarray:
    """A mask as runs [start, length, start, length, ...] of pixels to edit, row after row from the top left.

    Args:
        runs (`list[int]` or `str`): Starts from 0 and lengths, in pixels; as text, with spaces between.
        size (`tuple[int, int]`): Width and height, in pixels. A run that goes beyond the last pixel ends there.

    Returns:
        `np.ndarray`: bool, shape (height, width), True = edit.

    Raises:
        ValueError: If these are no such runs.
    """
    width, height = size
    if isinstance(runs, str) and re.fullmatch(r"[\d\s]*", runs):
        runs = [int(number) for number in runs.split()]
    if not isinstance(runs, list) or len(runs) % 2 or not all(type(value) is int for value in runs):
        raise ValueError("the mask has to be a list of integers [start, length, start, length, ...].")
    flat = np.zeros(width * height, dtype=bool)
    for start, length in zip(runs[::2], runs[1::2], strict=True):
        if not 0 <= start < flat.size or length < 0:
            raise ValueError(f"the mask has a run of {length} pixels from {start}, in an image of {flat.size} pixels.")
        flat[start : start + length] = True
    return flat.reshape(height, width)


def read_mask(mask: Image.Image, source: Image.Image, convention: str) -> Image.Image:
    """A mask as this package has it, whatever marks the edit in it.

    A mask that is the source with the region to edit painted white is one by the convention "white". So is one that
    should be transparent somewhere but has no transparency: MagicBrush has had both.

    Args:
        mask (`PIL.Image.Image`): In any mode, of any size with the source's aspect ratio.
        source (`PIL.Image.Image`): RGB.
        convention (`str`): One of [`~diffusers_iedit.pairs.columns.CONVENTIONS`].

    Returns:
        `PIL.Image.Image`: Mode L, 255 = edit and 0 elsewhere, as large as the source.

    Raises:
        ValueError: If the convention cannot be that of this mask; names the option.
    """
    opaque = np.asarray(mask.convert("RGBA"))[..., 3] >= 128 if mask.has_transparency_data else None
    if opaque is None or opaque.all():
        if convention == "painted":
            raise ValueError(
                "`mask_convention` is painted, but a mask has no transparency: nothing tells what is painted from what"
                " is not. What marks the edit in it, white or black?"
            )
        marked = _white_region(mask, source)
        marked = ~marked if convention == "black" else marked
    elif convention in ("white", "black"):
        raise ValueError(
            f"`mask_convention` is {convention}, but a mask has transparency: is the edit where it is transparent, or"
            " where something is painted? Pass transparent or painted."
        )
    else:
        marked = opaque if convention == "painted" else ~opaque
    return to_image(marked, source.size)


def to_image(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """A bool array (h, w) as a mask of the mode L and the size (width, height)."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return image if image.size == size else image.resize(size, Image.Resampling.NEAREST)


def _white_region(mask: Image.Image, source: Image.Image) -> np.ndarray:
    """What is white in a mask, (h, w) bool. Of a mask with a picture in it, only what the source has otherwise."""
    if mask.mode.startswith(("I", "F")):
        levels = np.asarray(mask, dtype=np.float32)
        return levels > levels.max() / 2
    pixels = np.asarray(mask.convert("RGB")).astype(np.int16)
    grey = pixels.max(-1)
    if grey.max() <= 1:
        # Zeros and ones that nobody scaled.
        return grey > 0
    colourful = (grey - pixels.min(-1) > 32).mean() > 0.01
    between = ((grey > 32) & (grey < 224)).mean() > 0.2
    if not colourful and not between:
        return grey >= 128
    white = pixels.min(-1) >= 250
    original = np.asarray(source.resize(mask.size, Image.Resampling.BILINEAR)).astype(np.int16)
    changed = np.abs(pixels - original).max(-1) > _HIGHEST
    # What was white before belongs to the region where it touches what was painted.
    labels, _ = ndimage.label(white, np.ones((3, 3)))
    return white & np.isin(labels, np.unique(labels[white & changed]))


def difference_mask(source: Image.Image, target: Image.Image) -> np.ndarray:
    """Where two pictures of one frame differ: what an edit changed, without noise, compression and a shift of colours.

    The noise is estimated from all pixels, most of which an edit leaves as they are. What stands out from it is closed
    and filled, as the inside of a thing may keep its colour, and specks are left out.

    Args:
        source, target (`PIL.Image.Image`): RGB, of one aspect ratio; the target is brought to the source's size.

    Returns:
        `np.ndarray`: bool, shape (h, w) of the source.
    """
    if target.size != source.size:
        target = target.resize(source.size, Image.Resampling.LANCZOS)
    change = np.asarray(target, dtype=np.float32) - np.asarray(source, dtype=np.float32)
    change = np.abs(change - np.median(change, axis=(0, 1))).max(-1)
    # A pixel of 512: an edge that moved by less has not changed.
    unit = min(source.size) / 512
    if unit > 0.5:
        change = ndimage.gaussian_filter(change, unit)
    middle = np.median(change)
    noise = 1.4826 * np.median(np.abs(change - middle))
    radius = max(round(4 * unit), 1)
    # With a margin, as nothing outside the picture is to be eroded by.
    marked = np.pad(change > max(_LOWEST, middle + _NOISE_LEVELS * noise), 2 * radius)
    marked = ndimage.binary_fill_holes(ndimage.binary_closing(marked, iterations=radius))
    marked = marked[2 * radius : -2 * radius, 2 * radius : -2 * radius]
    labels, count = ndimage.label(marked, np.ones((3, 3)))
    parts = np.arange(1, count + 1)
    strongest = ndimage.maximum(change, labels, parts)
    areas = ndimage.sum_labels(marked, labels, parts)
    clear = np.asarray(strongest) > max(_HIGHEST, middle + 2 * _NOISE_LEVELS * noise)
    return np.isin(labels, parts[clear & (np.asarray(areas) >= _SMALLEST_PART * marked.size)])
