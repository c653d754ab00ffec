"""The picture's side of an edit: read images and masks, cut the region out, match its colours, set it back.

Pure functions on PIL images and tensors, which know of no model. A picture keeps its own 8-bit pixels all the way, so
that a large photo costs a few bytes a pixel, and what is not edited stays the same byte.
"""

import io
import math
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from PIL import Image, ImageCms, ImageOps


logger = logging.get_logger(__name__)

MIN_IMAGE_SIZE = 8
"""The smallest side of a picture, and of a region at the size at which it is edited, in pixels."""

# What an image's values mean when it says nothing else, and what diffusion models know.
_SRGB = ImageCms.createProfile("sRGB")


def as_list(value) -> list:
    """A list or tuple as a list, anything else as a list of it."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check_pixels(name: str, value, smallest: int = 0) -> None:
    """Raises `ValueError` unless `value`, which messages call `name`, is a whole number of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < smallest:
        raise ValueError(f"`{name}` has to be an integer of at least {smallest} (pixels), but is {value!r}.")


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [0, 1]; floats as they are."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def _to_pil(pixels: torch.Tensor) -> Image.Image:
    """(C, H, W), uint8 or float32 in [0, 1] -> PIL of mode L, RGB or RGBA."""
    if pixels.dtype != torch.uint8:
        pixels = (pixels * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().squeeze(-1).numpy())


def _to_tensor(image: Image.Image) -> torch.Tensor:
    """PIL of an 8-bit mode -> uint8 (C, H, W), laid out in memory as it was."""
    array = np.array(image)
    return torch.from_numpy(array.reshape(image.height, image.width, len(image.getbands()))).permute(2, 0, 1)


# Reading


@dataclass
class Photo:
    """A picture as it is read.

    Args:
        pixels (`torch.Tensor`):
            Red, green and blue, and alpha where there is one, in the picture's own colour space: (3 or 4, H, W), on
            the CPU, uint8, or float32 in [0, 1] where it came so.
        icc_profile (`bytes`, *optional*): The ICC profile of `pixels`; without one they are sRGB.
        dpi (`tuple[float, float]`, *optional*): The print resolution that goes along.
    """

    pixels: torch.Tensor
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.pixels.shape[-2:]
        return height, width

    @cached_property
    def _transforms(self) -> tuple[ImageCms.ImageCmsTransform, ImageCms.ImageCmsTransform] | None:
        """To sRGB and back, or None where the pixels are taken as sRGB."""
        if self.icc_profile is None:
            return None
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(self.icc_profile))
            how = (ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION)
            return (
                ImageCms.buildTransform(profile, _SRGB, "RGB", "RGB", *how),
                ImageCms.buildTransform(_SRGB, profile, "RGB", "RGB", *how),
            )
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            logger.warning(
                f"The picture's colour profile cannot be used ({error}): it is kept, and the picture is edited as if"
                " it were sRGB."
            )
            return None

    def _convert(self, pixels: torch.Tensor, direction: int) -> torch.Tensor:
        if self._transforms is None:
            return pixels
        image = _to_pil(pixels)
        ImageCms.applyTransform(image, self._transforms[direction], inPlace=True)
        return to_unit_range(_to_tensor(image))

    def to_srgb(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels of the picture, (3, h, w), in sRGB."""
        return self._convert(pixels, 0)

    def from_srgb(self, pixels: torch.Tensor) -> torch.Tensor:
        """sRGB pixels, (3, h, w), in the picture's own colour space."""
        return self._convert(pixels, 1)

    def image(self) -> Image.Image:
        """The picture as models see it: PIL RGB, sRGB."""
        return _to_pil(self.to_srgb(self.pixels[:3]))


def _upright_8bit(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and bring the modes that `Image.convert` clips or refuses to 8 bits."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey, which Pillow opens as "I;16" or, from some formats, as "I".
        return Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, _SRGB, outputMode="RGB")  # type: ignore[return-value]
    if image.mode in ("RGBa", "La"):
        return image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    return image


def _usable_dpi(dpi) -> tuple[float, float] | None:
    """The DPI that a file names, or None where it is none (0, NaN) or more than formats hold: saving would fail."""
    try:
        horizontal, vertical = (float(value) for value in dpi)
    except (TypeError, ValueError):
        return None
    return (horizontal, vertical) if 0 < horizontal <= 65535 and 0 < vertical <= 65535 else None


def _read_pil(image: Image.Image) -> Photo:
    profile, dpi = image.info.get("icc_profile"), _usable_dpi(image.info.get("dpi"))
    if image.mode == "LAB":
        profile = None  # It becomes sRGB.
    image = _upright_8bit(image)
    if profile and image.mode in ("1", "F"):
        image = image.convert("L")
    if profile and image.mode in ("L", "LA", "CMYK"):
        # The result has three colours, which the profile of one or four does not describe: it becomes sRGB.
        alpha = image.convert("LA").getchannel("A") if image.has_transparency_data else None
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            colours = image if image.mode == "CMYK" else image.convert("L")
            image = ImageCms.profileToProfile(colours, own, _SRGB, outputMode="RGB")  # type: ignore[assignment]
        except (ImageCms.PyCMSError, OSError, ValueError) as error:
            logger.warning(f"The picture's colour profile cannot be used ({error}); it is left out.")
            image = image.convert("RGB")
        profile = None
        # Of one grey level that is transparent, which now is none of three colours.
        image.info.pop("transparency", None)
        if alpha is not None:
            image.putalpha(alpha)
    image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    return Photo(_to_tensor(image), profile or None, dpi)


def _array_in_unit_range(array: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    """A CPU tensor of the same shape: uint8 as it is, bool and floats as float32, checked to be in [0, 1]."""
    tensor = array.detach().cpu() if isinstance(array, torch.Tensor) else torch.from_numpy(np.array(array))
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype == torch.bool:
        return tensor.float()
    if not tensor.is_floating_point():
        raise TypeError(f"`{name}` has to be of dtype uint8, bool or floating point, but is {tensor.dtype}.")
    tensor = tensor.float()
    if tensor.isnan().any():
        raise ValueError(f"`{name}` contains NaN; expected values in [0, 1].")
    if tensor.numel() and (tensor.min() < 0 or tensor.max() > 1):
        raise ValueError(
            f"`{name}` has to have values in [0, 1], but they lie in [{tensor.min():.4g}, {tensor.max():.4g}]."
        )
    return tensor


def _read_entry(image) -> list[Photo]:
    """One entry of `image`, which may be a batch."""
    if isinstance(image, Photo):
        return [image]
    if isinstance(image, Image.Image):
        return [_read_pil(image)]
    if not isinstance(image, (np.ndarray, torch.Tensor)):
        raise TypeError(
            "`image` has to be a PIL image, a numpy array, a torch tensor or a list of these, but contains"
            f" {type(image).__name__}."
        )
    is_numpy = isinstance(image, np.ndarray)
    layout = "(H, W), (H, W, C) or (B, H, W, C)" if is_numpy else "(C, H, W) or (B, C, H, W)"
    batch = _array_in_unit_range(image, "image")
    if batch.ndim == 2 and is_numpy:
        batch = batch[..., None]
    if batch.ndim == 3:
        batch = batch[None]
    if is_numpy and batch.ndim == 4:
        batch = batch.permute(0, 3, 1, 2)
    if batch.ndim != 4 or batch.shape[1] not in (1, 3, 4):
        raise ValueError(f"`image` has to have shape {layout} with 1, 3 or 4 channels, but has {tuple(image.shape)}.")
    return [Photo(entry.expand(3, -1, -1) if len(entry) == 1 else entry) for entry in batch]


def read_photos(image) -> list[Photo]:
    """Read `image` in any of its forms.

    Args:
        image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
            PIL images of any mode, set upright by their EXIF orientation; arrays (H, W), (H, W, C) or (B, H, W, C),
            tensors (C, H, W) or (B, C, H, W), with 1, 3 or 4 channels, uint8 or floats in [0, 1]. A [`Photo`] is read
            already.

    Returns:
        `list[Photo]`: B pictures of one size.

    Raises:
        `ValueError` or `TypeError`: For an empty list, NaN, values outside [0, 1], images of different sizes and
        images under 8 pixels a side.
    """
    photos = [photo for entry in as_list(image) for photo in _read_entry(entry)]
    if not photos:
        raise ValueError("`image` is empty; expected at least one image.")
    sizes = {photo.size for photo in photos}
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(f"`image` holds images of different sizes ({listed}); edit them one call a size.")
    height, width = sizes.pop()
    if min(height, width) < MIN_IMAGE_SIZE:
        raise ValueError(f"`image` has to be at least {MIN_IMAGE_SIZE} pixels a side, but is {width}x{height} pixels.")
    return photos


def read_mask(mask, name: str) -> list[torch.Tensor]:
    """One entry of what `read_masks` takes, which messages call `name`, as float32 tensors (1, H, W) in [0, 1]."""
    if isinstance(mask, Image.Image):
        mask = _upright_8bit(mask)
        if mask.has_transparency_data:
            alpha = mask.convert("RGBA").getchannel("A")
            # A layer that was painted on; an opaque picture is a mask by its grey.
            mask = alpha if alpha.getextrema()[0] < 255 else mask.convert("RGB")
        mask = mask.convert("L")
        if mask.getextrema()[1] == 1:
            raise ValueError(f"`{name}` has the grey values 0 and 1 only, where 255 means edit.")
        return [to_unit_range(_to_tensor(mask))]
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        raise TypeError(
            f"`{name}` has to be a PIL image, a numpy array, a torch tensor or a list of these, but contains"
            f" {type(mask).__name__}."
        )
    if 0 in mask.shape:
        raise ValueError(f"`{name}` has no pixels: its shape is {tuple(mask.shape)}.")
    if mask.dtype in (np.uint8, torch.uint8) and mask.max() == 1:
        raise ValueError(
            f"`{name}` is uint8 with values 0 and 1 only, where 255 means edit; pass it as bool or float instead."
        )
    tensor = to_unit_range(_array_in_unit_range(mask, name))
    if isinstance(mask, np.ndarray) and tensor.ndim in (3, 4) and tensor.shape[-1] == 1:
        tensor = tensor[..., 0]
    if tensor.ndim == 4 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim == 2:
        tensor = tensor[None]
    if tensor.ndim != 3:
        raise ValueError(
            f"`{name}` has to have shape (H, W), (B, H, W), (B, H, W, 1) as numpy or (B, 1, H, W) as torch, but"
            f" has {tuple(mask.shape)}."
        )
    return [entry[None] for entry in tensor]


def read_masks(mask_image, batch_size: int, size: tuple[int, int]) -> torch.Tensor:
    """Read `mask_image` in any of its forms.

    Args:
        mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of these):
            1 (white) = edit. PIL images are set upright by their EXIF orientation. Where one has transparency, what is
            painted is the mask, in whatever colour; else it is read as grey. Arrays and tensors are (H, W), (B, H, W),
            (B, H, W, 1) as numpy or (B, 1, H, W) as torch: bool, uint8 (255 = edit) or floats in [0, 1].
        batch_size (`int`): B, how many images there are; one mask serves all of them.
        size (`tuple[int, int]`): Height and width of the images.

    Returns:
        `torch.Tensor`: float32 in [0, 1] on the CPU, shape (B, 1, H, W).

    Raises:
        `ValueError` or `TypeError`: For another size or number than the images', NaN, values outside [0, 1], and a
        mask that is zero everywhere.
    """
    masks = [mask for entry in as_list(mask_image) for mask in read_mask(entry, "mask_image")]
    if len(masks) not in (1, batch_size):
        raise ValueError(f"`mask_image` holds {len(masks)} masks for {batch_size} images; pass one or {batch_size}.")
    for mask in masks:
        if tuple(mask.shape[1:]) != size:
            raise ValueError(
                f"`mask_image` has to have the image's size, {size[1]}x{size[0]} pixels, but is"
                f" {mask.shape[2]}x{mask.shape[1]}."
            )
        if not mask.any():
            raise ValueError(
                "`mask_image` is zero everywhere, so nothing would be edited; 1 (white) means edit, and of a mask with"
                " transparency what is painted."
            )
    return torch.stack(masks).expand(batch_size, -1, -1, -1)


# Cutting out


class Region(NamedTuple):
    """A rectangle of a picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def of(self, picture: torch.Tensor) -> torch.Tensor:
        """The view of this rectangle of (..., H, W)."""
        return picture[..., self.top : self.top + self.height, self.left : self.left + self.width]


def bounding_box(mask: torch.Tensor) -> Region:
    """The smallest region that holds all of (1, H, W) that is above 0."""
    rows, columns = (mask[0].amax(dim).nonzero().flatten().tolist() for dim in (1, 0))
    return Region(rows[0], columns[0], rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0])


def surrounding_region(mask: torch.Tensor, padding: int) -> Region:
    """The region to edit for a mask: its bounding box and `padding` pixels of context on every side.

    It is grown to a square, as the models' own pictures are, or, where no such square fits into the picture, to the
    picture's aspect. At the border it is moved, not cut; where the mask leaves nothing else, it is the whole picture.

    Args:
        mask (`torch.Tensor`): (1, H, W), somewhere above 0.
        padding (`int`): Pixels.

    Returns:
        `Region`: Inside the picture, with all of the mask in it.
    """
    size, box = mask.shape[-2:], bounding_box(mask)
    side = max(box.size) + 2 * padding
    if side <= min(size):
        height, width = side, side
    else:
        scale = min(max((part + 2 * padding) / whole for part, whole in zip(box.size, size, strict=True)), 1)
        # Rounded up, but not by what a float is off.
        height, width = (math.ceil(whole * scale - 1e-6) for whole in size)
    top, left = (
        min(max(start + (part - length) // 2, 0), whole - length)
        for start, part, length, whole in zip(box[:2], box.size, (height, width), size, strict=True)
    )
    return Region(top, left, height, width)


def automatic_padding(mask: torch.Tensor, resolution: int) -> int | None:
    """The padding with which a mask's surroundings are best cut out, or None to edit the whole picture.

    It is a quarter of the longer side of the mask's bounding box, so that the thing fills two thirds of what the model
    sees: on the mini world less does as well, and with more, where neighbours come into view, edits fail more often.
    The whole picture is edited if it is no larger than the model's pictures, if the region would leave nothing out, or
    if it would be too thin at their size.

    Args:
        mask (`torch.Tensor`): (1, H, W), somewhere above 0.
        resolution (`int`): The longer side of the model's own pictures, in pixels.
    """
    padding = math.ceil(0.25 * max(bounding_box(mask).size))
    region = surrounding_region(mask, padding)
    too_thin = min(work_size(region.size, resolution)) < MIN_IMAGE_SIZE
    if max(mask.shape[-2:]) <= resolution or region.size == tuple(mask.shape[-2:]) or too_thin:
        return None
    return padding


def work_size(size: tuple[int, int], resolution: int | None) -> tuple[int, int]:
    """Height and width at which a region of `size` is edited: with `resolution` as its longer side, or its own."""
    if resolution is None:
        return size
    height, width = (max(round(side * resolution / max(size)), 1) for side in size)
    return height, width


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, h, w) in [0, 1] brought to another height and width, up or down."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(0, 1)


def pad_to_multiple(images: torch.Tensor, multiple: int, mode: str) -> torch.Tensor:
    """(B, C, h, w) with both sides padded to a multiple; `mode` as in `torch.nn.functional.pad`."""
    # To the right and below only, so that cropping gives every pixel its own place back.
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple), mode=mode)


def cut_out(photos: list[Photo], regions: list[Region], size: tuple[int, int]) -> torch.Tensor:
    """The regions of pictures as a model takes them: sRGB, float32 in [0, 1], (B, 3, *size)."""
    cut = [
        resize(to_unit_range(photo.to_srgb(region.of(photo.pixels[:3])))[None], size)[0]
        for photo, region in zip(photos, regions, strict=True)
    ]
    # Channels last in memory, as diffusers' own preprocessing leaves them, so that both round alike.
    return torch.stack([pixels.permute(1, 2, 0) for pixels in cut]).permute(0, 3, 1, 2)


# Setting back


# Of `_diffuse`, at each level of its pyramid. On the mini world the colour error that is left falls until here.
_SWEEPS = 64


def _diffuse(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`values` where `weight` is 1, and between them the smoothest surface (Laplace's equation, over a pyramid).

    Args:
        values (`torch.Tensor`): (B, C, h, w), 0 where `weight` is.
        weight (`torch.Tensor`): (B, 1, h, w) in [0, 1].
    """
    height, width = values.shape[-2:]
    if max(height, width) == 1:
        return values / weight.clamp(min=1e-6)
    pad = (0, width % 2, 0, height % 2)
    coarse = _diffuse(*(F.avg_pool2d(F.pad(each, pad), 2) for each in (values, weight)))
    coarse = F.interpolate(coarse, scale_factor=2.0, mode="bilinear")[..., :height, :width]
    surface = values + (1 - weight) * coarse
    for _ in range(_SWEEPS):
        padded = F.pad(surface, (1, 1, 1, 1), mode="replicate")
        rows, columns = padded[..., 1:-1], padded[..., 1:-1, :]
        mean = (rows[..., 2:, :] + rows[..., :-2, :] + columns[..., 2:] + columns[..., :-2]) / 4
        surface = values + (1 - weight) * mean
    return surface


# Between a decoded picture and its source, in [0, 1]: what is much more than this is no error of the VAE's.
_COLOUR_ERROR = 0.12


def match_colours(
    edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor, latent_mask: torch.Tensor
) -> torch.Tensor:
    """Take out of an edit what the VAE does to colours.

    Where nothing was edited, after Eq. 13, `edited` is the source as the VAE gives it back, so its error is known
    there, pixel by pixel. Into the mask that error is diffused from around it, and taken off: what membrane
    interpolation does in seamless cloning (Pérez et al., Poisson Image Editing, 2003), for the VAE's error. Between
    the mask's edge and that of its latent cells lies background that was edited but will not be seen: it counts as far
    as it has remained what it was.

    Args:
        edited (`torch.Tensor`): The decoded edit, (3, h, w) in [0, 1].
        source (`torch.Tensor`): What was encoded, same shape.
        mask (`torch.Tensor`): (1, h, w), above 0 where the edit will be seen.
        latent_mask (`torch.Tensor`): (1, h, w), above 0 where the latents were edited, at least where `mask` is.

    Returns:
        `torch.Tensor`: The corrected edit, same shape, in [0, 1]; outside the mask it is `source`.
    """
    # Of what surrounds the mask, a rim is enough, and much cheaper than all of a large picture.
    box, rim, size = bounding_box(latent_mask), 16, mask.shape[-2:]
    top, left = max(box.top - rim, 0), max(box.left - rim, 0)
    bottom, right = min(box.top + box.height + rim, size[0]), min(box.left + box.width + rim, size[1])
    box = Region(top, left, bottom - top, right - left)
    error = box.of(source) - box.of(edited)
    likely = torch.exp(-((error.abs().amax(0, keepdim=True) / _COLOUR_ERROR) ** 2))
    known = torch.where(box.of(latent_mask) == 0, 1.0, likely) * (box.of(mask) == 0)
    correction = _diffuse((error * known)[None], known[None])[0]
    corrected = torch.where(mask == 0, source, edited)
    box.of(corrected).add_(correction * (box.of(mask) > 0)).clamp_(0, 1)
    return corrected


def set_back(photo: Photo, region: Region, edited: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Set an edited region into its picture.

    Args:
        photo (`Photo`): The source.
        region (`Region`): Which part of it was edited.
        edited (`torch.Tensor`): sRGB, (3, region height, region width) in [0, 1].
        mask (`torch.Tensor`, *optional*): (1, H, W) in [0, 1], how far each pixel is replaced; None for all.

    Returns:
        `torch.Tensor`: The picture, like `photo.pixels`; where the mask is 0 and outside the region, unchanged.
    """
    result = photo.pixels.clone()
    place = region.of(result[:3])
    edited = to_unit_range(photo.from_srgb(edited))
    if mask is not None:
        own, mask = to_unit_range(place), region.of(mask)
        edited = torch.where(mask > 0, torch.lerp(own, edited, mask), own)
    place.copy_((edited * 255).round() if place.dtype == torch.uint8 else edited)
    return result


def blacked_out(photo: Photo) -> torch.Tensor:
    """Nothing of a picture but its size and alpha, like `photo.pixels`."""
    result = photo.pixels.clone()
    result[:3] = 0
    return result


def to_output(pictures: list[torch.Tensor], output_type: str, photos: list[Photo] | None = None) -> Any:
    """Pictures in the form asked for.

    Args:
        pictures (`list[torch.Tensor]`): (C, H, W) of one size, C = 1, 3 or 4, uint8 or float32 in [0, 1].
        output_type (`str`): `"pil"`, `"np"` or `"pt"`.
        photos (`list[Photo]`, *optional*): The source of each, whose colour profile and DPI a PIL image carries along.

    Returns:
        A list of PIL images (L, RGB or RGBA), an array (N, H, W, C) or a tensor (N, C, H, W) in [0, 1]; in an array or
        tensor all pictures have alpha if one has.
    """
    if output_type != "pil":
        channels = max(len(picture) for picture in pictures)
        pictures = [to_unit_range(picture) for picture in pictures]
        batch = torch.stack([F.pad(each, (0, 0, 0, 0, 0, channels - len(each)), value=1.0) for each in pictures])
        return batch if output_type == "pt" else batch.permute(0, 2, 3, 1).numpy()
    images = [_to_pil(picture) for picture in pictures]
    for image, photo in zip(images, photos or (), strict=False):
        carried = {"icc_profile": photo.icc_profile, "dpi": photo.dpi}
        image.info.update({name: value for name, value in carried.items() if value is not None})
    return images


# From picture to model and back


@dataclass
class Cutout:
    """Where in its picture one edit takes place, and at which size: the one way from a picture to a model and back.

    Args:
        photo (`Photo`, *optional*): The source; None where a model is given latents.
        region (`Region`): The part of it that is edited.
        size (`tuple[int, int]`): Height and width at which it is edited.
        mask (`torch.Tensor`, *optional*): M, (1, H, W) in [0, 1]; None where everything is edited.
        blend (`torch.Tensor`, *optional*): (1, H, W), how far each pixel is replaced at last; None as for `mask`.
    """

    # `Any` where only some methods need that it is there.
    photo: Any
    region: Region
    size: tuple[int, int]
    mask: Any
    blend: torch.Tensor | None

    @cached_property
    def work_mask(self) -> torch.Tensor:
        """The mask at the size of the edit, (1, *size): no marked pixel gets lost."""
        return F.adaptive_max_pool2d(self.region.of(self.mask), self.size)

    def latent_mask(self, cell: int, multiple: int) -> torch.Tensor:
        """The mask by latent cells of `cell` pixels, (1, h, w): a cell is edited if a pixel of it is.

        `multiple` is what the sides of the model's pictures are padded to.
        """
        return F.max_pool2d(pad_to_multiple(self.work_mask[None], multiple, mode="constant"), cell)[0]

    def set_back(self, edited: torch.Tensor, pixels: torch.Tensor, cell: int, multiple: int) -> torch.Tensor:
        """Bring the colours of an edit to the source's, scale it back, and set it into the source.

        Args:
            edited (`torch.Tensor`): (3, *size) in [0, 1], as the model decodes it.
            pixels (`torch.Tensor`): What the model was given, the same shape.
            cell, multiple (`int`): As for `latent_mask`.

        Returns:
            `torch.Tensor`: The picture, like `photo.pixels`.
        """
        if self.blend is not None:
            cells = F.interpolate(self.latent_mask(cell, multiple)[None], scale_factor=cell)[0]
            edited = match_colours(edited, pixels, self.work_mask, cells[..., : self.size[0], : self.size[1]])
        return set_back(self.photo, self.region, resize(edited[None], self.region.size)[0], self.blend)


def plan_edits(
    photos: list[Photo] | None,
    mask: torch.Tensor | None,
    blend: torch.Tensor | None,
    batch_size: int,
    size: tuple[int, int],
    padding_mask_crop: int | None,
    processing_resolution: int | None,
    native_resolution: int,
) -> list[Cutout]:
    """Settle which region of each picture is edited, and at which size.

    Args:
        photos (`list[Photo]`, *optional*): The sources, `batch_size` of them; None where a model is given latents.
        mask (`torch.Tensor`, *optional*): M, (B, 1, H, W).
        blend (`torch.Tensor`, *optional*): How far each pixel is replaced at last, (B, 1, H, W); None for all of it.
        batch_size (`int`): B.
        size (`tuple[int, int]`): Height and width of the pictures.
        padding_mask_crop, processing_resolution: As for an edit.
        native_resolution (`int`): The longer side of the pictures that the model was made for.

    Raises:
        `ValueError`: If a region would be edited at under 8 pixels a side.
    """
    regions = [Region(0, 0, *size)] * batch_size
    crops = False
    if padding_mask_crop is not None and mask is not None:
        crops = True
        regions = [surrounding_region(each, padding_mask_crop) for each in mask]
        processing_resolution = processing_resolution or native_resolution
    # A region is a square or has the picture's aspect, but for what whole pixels cannot express.
    shapes = [region.size if region.height == region.width else size for region in regions]
    work_sizes = [work_size(shape, processing_resolution) for shape in shapes]
    for region, (height, width) in zip(regions, work_sizes, strict=True):
        if crops and min(height, width) < MIN_IMAGE_SIZE:
            raise ValueError(
                f"`padding_mask_crop` {padding_mask_crop} gives a region of {region.width}x{region.height} pixels,"
                f" which would be edited at {width}x{height}; its sides have to be {MIN_IMAGE_SIZE} at least."
            )
    largest = max(work_sizes, key=max)
    if max(largest) > 2 * native_resolution:
        ways = [f"to edit a small copy, pass `processing_resolution={native_resolution}`"]
        if padding_mask_crop is None:
            ways.append("to edit only the surroundings of a mask, `padding_mask_crop=32`")
        logger.warning(
            f"The edit runs at {largest[1]}x{largest[0]} pixels, which takes much memory and is far from the"
            f" {native_resolution} pixels of the model; {'; '.join(ways)}. The result is set into the original."
        )
    nothing = [None] * batch_size
    return [
        Cutout(*each)
        for each in zip(
            nothing if photos is None else photos,
            regions,
            work_sizes,
            nothing if mask is None else mask,
            nothing if blend is None else blend,
            strict=True,
        )
    ]


def check_sizes(mask_given: bool, padding_mask_crop, processing_resolution, output_type: str) -> None:
    """Raises `ValueError` for values of an edit's arguments that fit no picture."""
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` has to be 'pil', 'np', 'pt' or 'latent', but is {output_type!r}.")
    if processing_resolution is not None:
        check_pixels("processing_resolution", processing_resolution, MIN_IMAGE_SIZE)
    if padding_mask_crop is not None:
        check_pixels("padding_mask_crop", padding_mask_crop)
        if not mask_given:
            raise ValueError(
                "`padding_mask_crop` edits the surroundings of a mask; pass `mask_image`, `mask_prompt` or"
                " `source_prompt` too."
            )
        if output_type == "latent":
            raise ValueError("`padding_mask_crop` sets pixels back, but `output_type` asks for latents.")
