"""The metrics (Sec. 4.1), as functions on tensors: is what was asked for there, and is the rest of the picture kept?

Images are of shape (B, 3, H, W) in [0, 1], masks of shape (B, 1, H, W), 1 = edit; a result is of shape (B,). Which of
them an evaluation takes, and from what, is in `measuring.py`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from skimage.metrics import structural_similarity
from skimage.registration import phase_cross_correlation


CLIP_SCORE_WEIGHT = 2.5
"""Of the cosine, as in Hessel et al., https://huggingface.co/papers/2104.08718; the paper's figures fit it."""

SSIM_RADIUS = 5
"""Of the Gaussian window, in pixels."""

HIGHEST_PSNR = 100.0
"""What equal images get, in dB. Their ratio is infinite, of which there is no mean."""


def clip_similarity(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """The cosine of CLIP embeddings.

    Args:
        image_embeds (`torch.Tensor`): CLIP embeddings of the edited images, of any length, shape (B, D).
        text_embeds (`torch.Tensor`): CLIP embeddings of the edit prompts, same shape.

    Returns:
        `torch.Tensor`: Cosines in [-1, 1], shape (B,).
    """
    return F.cosine_similarity(image_embeds, text_embeds, dim=-1)


def clip_score(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """CLIPScore: 2.5 max(cosine, 0).

    Args:
        image_embeds (`torch.Tensor`): CLIP embeddings of the edited images, of any length, shape (B, D).
        text_embeds (`torch.Tensor`): CLIP embeddings of the edit prompts, same shape.

    Returns:
        `torch.Tensor`: Scores in [0, 2.5], shape (B,).
    """
    return CLIP_SCORE_WEIGHT * clip_similarity(image_embeds, text_embeds).clamp(min=0)


def clip_directional(
    image_embeds: torch.Tensor,
    source_image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    source_text_embeds: torch.Tensor,
) -> torch.Tensor:
    """Does the image change as the text does? The cosine of the two differences, each of unit embeddings.

    As Brooks et al. (https://huggingface.co/papers/2211.09800) measure it, after StyleGAN-NADA. An image that has not
    changed at all, and a text that has not, have no direction: they get 0.

    Args:
        image_embeds (`torch.Tensor`): CLIP embeddings of the edited images, of any length, shape (B, D).
        source_image_embeds (`torch.Tensor`): Of the images before, same shape.
        text_embeds (`torch.Tensor`): Of the edit prompts, same shape.
        source_text_embeds (`torch.Tensor`): Of the source captions, same shape.

    Returns:
        `torch.Tensor`: Cosines in [-1, 1], shape (B,).
    """
    image, source_image, text, source_text = (
        F.normalize(embeds, dim=-1) for embeds in (image_embeds, source_image_embeds, text_embeds, source_text_embeds)
    )
    return F.cosine_similarity(image - source_image, text - source_text, dim=-1)


def _ssim_map(edited: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """SSIM of the window around each pixel, (B, 1, H, W); beyond the frame, windows see its mirror image."""
    maps = []
    for pair in zip(edited.double().cpu().numpy(), source.double().cpu().numpy(), strict=True):
        mirrored = [np.pad(image, ((0, 0), *[(SSIM_RADIUS, SSIM_RADIUS)] * 2), mode="reflect") for image in pair]
        # The constants of Wang et al.; scikit-image has others by default.
        _, full = structural_similarity(
            *mirrored,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        maps.append(full.mean(0, keepdims=True))
    return torch.from_numpy(np.stack(maps))[..., SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]


def _check(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> None:
    if edited.shape != source.shape or mask.shape != (len(edited), 1, *edited.shape[-2:]):
        raise ValueError(
            "`edited` and `source` have to be of one shape (B, 3, H, W) and `mask` of shape (B, 1, H, W), got "
            f"{tuple(edited.shape)}, {tuple(source.shape)} and {tuple(mask.shape)}."
        )


def ssim_m(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SSIM-M as the paper most likely computed it: both images times the mask, then the mean over the whole frame.

    What is black in both counts as perfectly alike, so a small mask comes out high. Neither high nor low is good by
    itself (Sec. 4.3).

    Args:
        edited (`torch.Tensor`): The edited images, shape (B, 3, H, W), in [0, 1].
        source (`torch.Tensor`): The images before, same shape.
        mask (`torch.Tensor`): Where the edit belongs, shape (B, 1, H, W), 1 = edit.

    Returns:
        `torch.Tensor`: SSIM, at most 1, shape (B,).

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(edited, source, mask)
    return _ssim_map(edited * mask, source * mask).mean((1, 2, 3))


def ssim_not_m(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """SSIM of the background as the paper most likely computed it: `ssim_m` of the inverted mask. Higher is better."""
    return ssim_m(edited, source, 1 - mask)


def ssim_m_region(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of the SSIM map of the two images over the mask alone; arguments and result as for `ssim_m`.

    The map's windows are 11 pixels wide: near the mask's edge they see both sides of it.
    """
    _check(edited, source, mask)
    return (_ssim_map(edited, source) * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))


def ssim_not_m_region(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`ssim_m_region` of the background: how well it is kept."""
    return ssim_m_region(edited, source, 1 - mask)


def ssim(edited: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """SSIM (Wang et al. 2004), the mean over all windows that fit in the frame; they are 11 pixels wide.

    Args:
        edited (`torch.Tensor`): Images, shape (B, 3, H, W), in [0, 1].
        source (`torch.Tensor`): The images they are compared with, same shape.

    Returns:
        `torch.Tensor`: SSIM, at most 1, shape (B,).
    """
    inside = _ssim_map(edited, source)[..., SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]
    return inside.mean((1, 2, 3))


def mse(edited: torch.Tensor, source: torch.Tensor, region: torch.Tensor | None = None) -> torch.Tensor:
    """The mean square difference.

    Args:
        edited (`torch.Tensor`): Images, shape (B, 3, H, W), in [0, 1].
        source (`torch.Tensor`): The images they are compared with, same shape.
        region (`torch.Tensor`, *optional*): Which pixels count, shape (B, 1, H, W), 1 = counts; by default all.

    Returns:
        `torch.Tensor`: Values in [0, 1], NaN where the region is empty, shape (B,).

    Raises:
        ValueError: If the shapes do not fit.
    """
    if region is None:
        region = torch.ones_like(edited[:, :1])
    _check(edited, source, region)
    error = (edited.double() - source.double()).square().mean(1, keepdim=True)
    return (error * region).sum((1, 2, 3)) / region.sum((1, 2, 3))


def psnr(edited: torch.Tensor, source: torch.Tensor, region: torch.Tensor | None = None) -> torch.Tensor:
    """Peak signal to noise ratio in dB, -10 log10(`mse`), at most 100: what equal images get. Arguments as for `mse`.

    A single 8-bit value that is one step off gives less in pictures of up to 226 x 226 pixels.
    """
    return -10 * mse(edited, source, region).clamp(min=10 ** (-HIGHEST_PSNR / 10)).log10()


def background_equal(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The share of the background's pixels whose three 8-bit values are the source's.

    Args:
        edited (`torch.Tensor`): The edited images, shape (B, 3, H, W), in [0, 1].
        source (`torch.Tensor`): The images before, same shape.
        mask (`torch.Tensor`): Where the edit belongs, shape (B, 1, H, W), 1 = edit; a pixel with any other value
            belongs to the background.

    Returns:
        `torch.Tensor`: Shares in [0, 1], NaN where there is no background, shape (B,).

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(edited, source, mask)
    equal = ((255 * edited).round() == (255 * source).round()).all(1, keepdim=True)
    background = mask != 1
    return (equal & background).sum((1, 2, 3)) / background.sum((1, 2, 3))


def shift(edited: torch.Tensor, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How far the background has moved as a whole, in pixels.

    First in whole pixels, by the masked cross-correlation of Padfield (2012) where at least 70 % of the backgrounds
    overlap. Such a shift counts if undoing it halves the squared difference of the backgrounds; otherwise they have
    changed, not moved. Then to a twentieth of a pixel, by the cross-correlation of what does not vary slowly
    (Guizar-Sicairos et al. 2008). Along a direction in which the background is smooth, no shift can be seen, and noise
    looks like one of a tenth of a pixel or so.

    Args:
        edited (`torch.Tensor`): The edited images, shape (B, 3, H, W), in [0, 1].
        source (`torch.Tensor`): The images before, same shape.
        mask (`torch.Tensor`): Where the edit belongs, shape (B, 1, H, W), 1 = edit; a pixel with any other value
            belongs to the background.

    Returns:
        `torch.Tensor`: Lengths of the shifts, NaN where there is no background, shape (B,).

    Raises:
        ValueError: If the shapes do not fit.
    """
    _check(edited, source, mask)
    # In pixels. It and the shares were chosen on photographs and mini pictures with known shifts.
    blur = 4
    lengths = []
    for images in zip(source, edited, mask, strict=True):
        before, after, edit = (image.double().mean(0).cpu().numpy() for image in images)
        background = edit != 1
        if not background.any():
            lengths.append(math.nan)
            continue
        masks = {"reference_mask": background, "moving_mask": background, "overlap_ratio": 0.7}
        way = np.round(phase_cross_correlation(before, after, **masks)[0])
        returned = ndimage.shift(after, way, order=0)
        inside = background & ndimage.shift(background, way, order=0)
        if np.square(returned - before)[inside].sum() >= 0.5 * np.square(after - before)[inside].sum():
            way, returned = np.zeros(2), after
        share = np.maximum(ndimage.gaussian_filter(background.astype(float), blur), 1e-6)
        details = [
            background * (x - ndimage.gaussian_filter(x * background, blur) / share) for x in (before, returned)
        ]
        # Flat pictures have none.
        if all(detail.any() for detail in details):
            rest = phase_cross_correlation(*details, upsample_factor=20, normalization=None)[0]
            # More than a pixel is a chance peak: the whole pixels are known.
            way += rest * (np.abs(rest).max() <= 1)
        lengths.append(np.hypot(*way))
    return torch.tensor(lengths)


def lpips(
    edited_features: list[torch.Tensor], source_features: list[torch.Tensor], weights: list[torch.Tensor]
) -> torch.Tensor:
    """LPIPS (https://huggingface.co/papers/1801.03924), from the features of [`~evaluation.networks.LPIPSFeatures`].

    Args:
        edited_features (`list[torch.Tensor]`): Of the edited images, one of each layer, (B, C, H', W').
        source_features (`list[torch.Tensor]`): Of the images before, likewise.
        weights (`list[torch.Tensor]`): Of the channels, one of each layer, (C,).

    Returns:
        `torch.Tensor`: Distances, 0 for equal images, shape (B,).
    """
    total = edited_features[0].new_zeros(len(edited_features[0]))
    for edited, source, weight in zip(edited_features, source_features, weights, strict=True):
        difference = F.normalize(edited, dim=1) - F.normalize(source, dim=1)
        total = total + torch.einsum("bchw,c->bhw", difference.square(), weight).mean((1, 2))
    return total


def structure_distance(edited_keys: torch.Tensor, source_keys: torch.Tensor) -> torch.Tensor:
    """How much the structure changes: the mean square difference of the self-similarities of DINO's keys.

    From Tumanyan et al., https://huggingface.co/papers/2201.00424.

    Args:
        edited_keys (`torch.Tensor`): Of the edited images, as from [`~evaluation.networks.StructureKeys`], shape
            (B, tokens, D).
        source_keys (`torch.Tensor`): Of the images before, same shape.

    Returns:
        `torch.Tensor`: Distances, 0 for equal images, 4 at most, shape (B,).
    """
    edited, source = (F.normalize(keys, dim=-1) for keys in (edited_keys, source_keys))
    return (edited @ edited.mT - source @ source.mT).square().mean((1, 2))


def fid(features: torch.Tensor, reference_features: torch.Tensor) -> float:
    """Fréchet inception distance of two sets of images (https://huggingface.co/papers/1706.08500).

    It falls as the sets grow: only sets of equal size can be compared, and thousands are customary.

    Args:
        features (`torch.Tensor`): Of the edited images, shape (N, D).
        reference_features (`torch.Tensor`): Of the images they should look like, shape (M, D).

    Returns:
        `float`: The distance, 0 for equal sets.

    Raises:
        ValueError: If a set has fewer than two images, or the features are of different lengths.
    """
    if features.ndim != 2 or features.shape[1:] != reference_features.shape[1:]:
        raise ValueError(
            "`features` and `reference_features` have to be of the shapes (N, D) and (M, D), got "
            f"{tuple(features.shape)} and {tuple(reference_features.shape)}."
        )
    if min(len(features), len(reference_features)) < 2:
        raise ValueError(f"FID needs two images a set or more, got {len(features)} and {len(reference_features)}.")
    means = [values.double().mean(0) for values in (features, reference_features)]
    # S_1 = A_1^T A_1, and the trace of the root of S_1 S_2 is the sum of the singular values of A_1 A_2^T. Unlike the
    # root itself, that is exact for fewer images than features, which evaluations of edits have.
    deviations = [
        (values.double() - mean) / (len(values) - 1) ** 0.5
        for values, mean in zip((features, reference_features), means, strict=True)
    ]
    spread = sum(values.square().sum() for values in deviations)
    overlap = torch.linalg.svdvals(deviations[0] @ deviations[1].T).sum()
    distance = (means[0] - means[1]).square().sum() + spread - 2 * overlap
    return max(distance.item(), 0.0)


def edit_window(mask: torch.Tensor) -> tuple[slice, slice]:
    """The rows and columns of the smallest square around the mask, as far as the frame has room for a square.

    Args:
        mask (`torch.Tensor`): Shape (1, H, W), anything but 0 counts; an empty mask gives the whole frame.

    Returns:
        `tuple[slice, slice]`: Of rows and of columns.
    """
    height, width = mask.shape[-2:]
    rows, columns = (mask[0].any(axis).nonzero().flatten() for axis in (1, 0))
    if not len(rows):
        return slice(0, height), slice(0, width)
    side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
    window = []
    for marked, length in ((rows, height), (columns, width)):
        size = min(side, length)
        start = (int(marked[0] + marked[-1]) + 1 - size) // 2
        start = min(max(start, 0), length - size)
        window.append(slice(start, start + size))
    return window[0], window[1]


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images of one size, B of them -> float32, (B, 3, H, W) for RGB and (B, 1, H, W) for L, in [0, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).permute(0, 3, 1, 2).float() / 255
