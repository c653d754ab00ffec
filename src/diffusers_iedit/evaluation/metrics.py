"""The metrics (Sec. 4.1): does the edit show what was asked for, and is the rest of the picture kept?

First the metrics as functions on tensors, then `METRICS`, which names those of an evaluation, and `Metrics`, which
takes them from edited pictures. Images are of shape (B, 3, H, W) in [0, 1], masks of shape (B, 1, H, W), 1 = edit;
a result is of shape (B,).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from skimage.metrics import structural_similarity
from skimage.registration import phase_cross_correlation


if TYPE_CHECKING:
    from .data import Example
    from .networks import Networks


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
    total = 0
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
    return tuple(window)


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """PIL images of one size, B of them -> float32, (B, 3, H, W) for RGB and (B, 1, H, W) for L, in [0, 1]."""
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels.reshape(*pixels.shape[:3], -1)).permute(0, 3, 1, 2).float() / 255


class _Batch:
    """Edits of one size and what the metrics ask of them; what takes a network is made once, and only if asked for."""

    def __init__(self, examples: list[Example], edited: list[Image.Image], networks: Networks):
        self.examples, self.edited_images, self.networks = examples, edited, networks
        self.edited, self.source = to_tensor(edited), to_tensor([example.image for example in examples])
        self.mask = self._masks("mask")
        if examples[0].target_mask is not None:
            self.mask = torch.maximum(self.mask, self._masks("target_mask"))
        self.background = 1 - self.mask
        # Black times black would count as perfectly alike: what there is not is not a number.
        self.with_mask, self.with_background = (
            torch.where(region.any(-1).any(-1).any(-1), 1.0, math.nan) for region in (self.mask, self.background)
        )
        self.edited_background, self.source_background = self.edited * self.background, self.source * self.background

    def _masks(self, name: str) -> torch.Tensor:
        return (to_tensor([getattr(example, name) for example in self.examples]) >= 0.5).float()

    def _embed(self, *images: torch.Tensor) -> torch.Tensor:
        return self.networks.get("clip").embed_images(*(batch.to(self.networks.device) for batch in images)).cpu()

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        return self.networks.get("clip").embed_texts(texts).cpu()

    @cached_property
    def edited_embeds(self) -> torch.Tensor:
        return self._embed(self.edited)

    @cached_property
    def prompt_embeds(self) -> torch.Tensor:
        return self._embed_texts([example.edit_prompt for example in self.examples])

    def clip_directional(self) -> torch.Tensor:
        captions = self._embed_texts([example.source_caption for example in self.examples])
        return clip_directional(self.edited_embeds, self._embed(self.source), self.prompt_embeds, captions)

    def clip_score_region(self) -> torch.Tensor:
        windows = []
        for image, mask in zip(self.edited, self.mask, strict=True):
            rows, columns = edit_window(mask)
            windows.append(image[None, :, rows, columns])
        terms = self._embed_texts([example.target_term or example.edit_prompt for example in self.examples])
        return clip_score(self._embed(*windows), terms) * self.with_mask

    def pie_clip_region(self) -> torch.Tensor:
        embeds = self._embed(self.edited * self.mask)
        return 100 * clip_similarity(embeds, self.prompt_embeds).clamp(min=0) * self.with_mask

    def lpips(self, edited: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        network = self.networks.get("lpips")
        distances = []
        # One by one: the activations of the first layer are 67 MB for 512 x 512 pixels.
        for pair in zip(edited.to(self.networks.device), source.to(self.networks.device), strict=True):
            distances.append(lpips(*(network(image[None]) for image in pair), network.weights).cpu())
        return torch.cat(distances)

    def structure_distance(self, scale: float, antialias: bool) -> torch.Tensor:
        network = self.networks.get("dino")
        distances = []
        for pair in zip(self.edited.to(self.networks.device), self.source.to(self.networks.device), strict=True):
            distances.append(structure_distance(*(network(scale * i[None], antialias) for i in pair)).cpu())
        return torch.cat(distances)

    @cached_property
    def right(self) -> torch.Tensor:
        """Does the judge see the noun and the colour asked for in the mask, and the scene in the picture? (3, B)"""
        there = self.networks.judge.look(self.edited_images, [example.mask for example in self.examples])
        whole = self.networks.judge.look(self.edited_images)
        seen = [(a.noun, a.colour, b.scene) for a, b in zip(there, whole, strict=True)]
        asked = [example.thing for example in self.examples]
        answers = [[x == y for x, y in zip(*pair, strict=True)] for pair in zip(seen, asked, strict=True)]
        return torch.tensor(answers, dtype=torch.float).T

    @cached_property
    def target(self) -> torch.Tensor:
        return to_tensor([example.target for example in self.examples])


@dataclass(frozen=True)
class MetricInfo:
    """A metric of an evaluation.

    Args:
        title (`str`): Its name in a table.
        better (`str` or `None`): "higher", "lower", or None if neither is good by itself.
        about (`str`): What it measures, for a reader of the table.
        needs (`tuple[str, ...]`): Its networks, as in `networks.DEFAULT_MODELS`, and what an example has to have.
        compute (`Callable`): The metric of a batch, (B,), NaN where it is not defined; None if it is one of sets.
    """

    title: str
    better: Literal["higher", "lower"] | None
    about: str
    needs: tuple[str, ...]
    compute: Callable[[_Batch], torch.Tensor] | None


METRICS = {
    "success": MetricInfo(
        "Success",
        "higher",
        "share of edits in whose mask the judge of the mini world sees the thing and the colour asked for",
        ("thing",),
        lambda b: b.right[0] * b.right[1],
    ),
    "thing": MetricInfo(
        "Thing",
        "higher",
        "share of edits with the thing asked for, by the judge",
        ("thing",),
        lambda b: b.right[0],
    ),
    "colour": MetricInfo(
        "Colour",
        "higher",
        "share of edits with the colour asked for, by the judge",
        ("thing",),
        lambda b: b.right[1],
    ),
    "scene_kept": MetricInfo(
        "Scene kept",
        "higher",
        "share of edits in the scene asked for, by the judge",
        ("thing",),
        lambda b: b.right[2],
    ),
    "clip_score": MetricInfo(
        "CLIPScore",
        "higher",
        "2.5 x cosine of the CLIP embeddings of the edited image and of the edit prompt, 0 at least; no words are put "
        "before the prompt",
        ("clip",),
        lambda b: clip_score(b.edited_embeds, b.prompt_embeds),
    ),
    "clip_similarity": MetricInfo(
        "CLIP cosine",
        "higher",
        "cosine of the CLIP embeddings of the edited image and of the edit prompt",
        ("clip",),
        lambda b: clip_similarity(b.edited_embeds, b.prompt_embeds),
    ),
    "clip_directional": MetricInfo(
        "CLIP direction",
        "higher",
        "cosine of what changes in the CLIP embedding of the image and what changes from the source caption to the "
        "edit prompt; 0 for an unchanged image",
        ("clip",),
        _Batch.clip_directional,
    ),
    "clip_score_region": MetricInfo(
        "CLIPScore, region",
        "higher",
        "CLIPScore of the square around the edit region and of the term for what should be there (of the edit prompt "
        "where there is no term)",
        ("clip",),
        _Batch.clip_score_region,
    ),
    "ssim_m": MetricInfo(
        "SSIM-M",
        None,
        "SSIM of the edited image and the source, both black outside the edit region, over the whole frame; as the "
        "paper most likely has it",
        (),
        lambda b: ssim_m(b.edited, b.source, b.mask),
    ),
    "ssim_not_m": MetricInfo(
        "SSIM-notM",
        "higher",
        "SSIM of the edited image and the source, both black inside the edit region, over the whole frame; as the "
        "paper most likely has it",
        (),
        lambda b: ssim_not_m(b.edited, b.source, b.mask),
    ),
    "ssim_m_region": MetricInfo(
        "SSIM, region",
        None,
        "mean of the SSIM map of the edited image and the source over the edit region",
        (),
        lambda b: ssim_m_region(b.edited, b.source, b.mask),
    ),
    "ssim_not_m_region": MetricInfo(
        "SSIM, background",
        "higher",
        "mean of the SSIM map of the edited image and the source over the background",
        (),
        lambda b: ssim_not_m_region(b.edited, b.source, b.mask),
    ),
    "psnr": MetricInfo(
        "PSNR, background",
        "higher",
        "peak signal to noise ratio of the background in dB, 100 at most",
        (),
        lambda b: psnr(b.edited, b.source, b.background),
    ),
    "mse": MetricInfo(
        "MSE, background",
        "lower",
        "mean square error of the background, of values in [0, 1]",
        (),
        lambda b: mse(b.edited, b.source, b.background),
    ),
    "background_equal": MetricInfo(
        "Background equal",
        "higher",
        "share of the background's pixels that are the source's to the byte",
        (),
        lambda b: background_equal(b.edited, b.source, b.mask),
    ),
    "shift": MetricInfo(
        "Shift",
        "lower",
        "how far the background has moved as a whole, in pixels",
        (),
        lambda b: shift(b.edited, b.source, b.mask),
    ),
    "lpips": MetricInfo(
        "LPIPS",
        "lower",
        "perceptual distance of the edited image to the source over the whole frame (VGG-16, version 0.1); 0 for an "
        "unchanged image, so read it beside CLIPScore",
        ("lpips",),
        lambda b: b.lpips(b.edited, b.source),
    ),
    "structure_distance": MetricInfo(
        "Structure distance",
        "lower",
        "distance of the self-similarities of DINO's keys, edited image to source; 0 for an unchanged image, so read "
        "it beside CLIPScore",
        ("dino",),
        lambda b: b.structure_distance(scale=1, antialias=True),
    ),
    "fid": MetricInfo(
        "FID",
        "lower",
        "Fréchet distance of the features of the edited images and of the reference images; it depends on the number "
        "of images and on the network",
        ("fid",),
        None,
    ),
    "psnr_to_target": MetricInfo(
        "PSNR to target",
        "higher",
        "peak signal to noise ratio of the edited image and the true edit, whole frame, in dB",
        ("target",),
        lambda b: psnr(b.edited, b.target),
    ),
    "ssim_to_target": MetricInfo(
        "SSIM to target",
        "higher",
        "SSIM of the edited image and the true edit, whole frame",
        ("target",),
        lambda b: ssim(b.edited, b.target),
    ),
    "pie_clip": MetricInfo(
        "PIE-Bench CLIP, whole",
        "higher",
        "100 x cosine of the CLIP embeddings of the edited image and of the edit prompt, 0 at least",
        ("clip",),
        lambda b: 100 * clip_similarity(b.edited_embeds, b.prompt_embeds).clamp(min=0),
    ),
    "pie_clip_region": MetricInfo(
        "PIE-Bench CLIP, edited",
        "higher",
        "the same with all but the edit region black, and the whole edit prompt",
        ("clip",),
        _Batch.pie_clip_region,
    ),
    "pie_psnr": MetricInfo(
        "PIE-Bench PSNR",
        "higher",
        "peak signal to noise ratio to the source over the whole frame, the edit region black in both, in dB, 100 at "
        "most",
        (),
        lambda b: psnr(b.edited_background, b.source_background) * b.with_background,
    ),
    "pie_mse": MetricInfo(
        "PIE-Bench MSE",
        "lower",
        "mean square error to the source over the whole frame, the edit region black in both",
        (),
        lambda b: mse(b.edited_background, b.source_background) * b.with_background,
    ),
    "pie_ssim": MetricInfo(
        "PIE-Bench SSIM",
        "higher",
        "SSIM to the source over the whole frame, the edit region black in both",
        (),
        lambda b: ssim(b.edited_background, b.source_background) * b.with_background,
    ),
    "pie_lpips_vgg": MetricInfo(
        "PIE-Bench LPIPS, VGG",
        "lower",
        "LPIPS to the source over the whole frame, the edit region black in both; with VGG-16, while the published "
        "figures are SqueezeNet's, so the two cannot be compared",
        ("lpips",),
        lambda b: b.lpips(b.edited_background, b.source_background) * b.with_background,
    ),
    "pie_structure_distance": MetricInfo(
        "PIE-Bench structure distance",
        "lower",
        "the structure distance as PIE-Bench publishes it: its code gives DINO values up to 255 instead of 1 and "
        "resizes without a filter",
        ("dino",),
        lambda b: b.structure_distance(scale=255, antialias=False),
    ),
}
"""The metrics of an evaluation, by name. A metric's name is the name of its function where it has one.

The edit region is the example's mask and, where there is a target mask, the union of both: what the new thing covers
is not background. Grey masks count as 1 from 128 on. The names that begin with "pie_" are PIE-Bench's metrics as its
code computes them (https://huggingface.co/papers/2310.01506), LPIPS excepted.
"""


class Metrics:
    """Takes metrics from edited pictures.

    Args:
        names (`Sequence[str]` or `None`): Of `METRICS`; None takes all whose networks can be had.
        networks (`Networks`): Where the networks come from. Only those are loaded that a metric needs.

    Attributes:
        infos (`dict[str, MetricInfo]`): The metrics that are taken.

    Raises:
        ValueError: If there is no such metric, or the network of a metric that was asked for, or one that was chosen,
            cannot be loaded.
    """

    def __init__(self, names: Sequence[str] | None, networks: Networks):
        if unknown := sorted(set(names or ()) - set(METRICS)):
            raise ValueError(f"There is no metric {', '.join(unknown)}. There are {', '.join(METRICS)}.")
        self.networks = networks
        self.infos = {}
        for name, info in METRICS.items():
            parts = [part for part in info.needs if part in networks.models]
            if names is None:
                if all(networks.find(part) for part in parts):
                    self.infos[name] = info
            elif name in names:
                for part in parts:
                    networks.get(part)
                self.infos[name] = info

    @torch.no_grad()
    def measure(self, examples: Sequence[Example], edited: Sequence[Image.Image]) -> list[dict[str, float]]:
        """Takes all metrics of single pictures, which is all but FID.

        Args:
            examples (`Sequence[Example]`): The examples.
            edited (`Sequence[PIL.Image.Image]`): What a method made of each, RGB.

        Returns:
            `list[dict[str, float]]`: By metric, one dictionary an example. A metric that is not defined for an example
            is not in it: without a target, a thing to ask the judge for, an edit region or a background.

        Raises:
            ValueError: If the numbers differ, or an edited picture is not of the size of its source.
        """
        if len(examples) != len(edited):
            raise ValueError(f"`edited` has to hold one image an example, got {len(edited)} for {len(examples)}.")
        groups = defaultdict(list)
        for index, (example, image) in enumerate(zip(examples, edited, strict=True)):
            if image.size != example.image.size:
                raise ValueError(
                    f"{example.key}: the edited image has to be of the source's size, {example.image.size}, got "
                    f"{image.size}."
                )
            missing = tuple(getattr(example, name) is None for name in ("target", "target_mask", "thing"))
            groups[image.size, missing].append(index)
        results = [{} for _ in examples]
        for (_, missing), indices in groups.items():
            absent = {name for name, gone in zip(("target", "target_mask", "thing"), missing, strict=True) if gone}
            batch = _Batch([examples[i] for i in indices], [edited[i] for i in indices], self.networks)
            for name, info in self.infos.items():
                if info.compute is None or absent & set(info.needs):
                    continue
                for index, value in zip(indices, info.compute(batch).tolist(), strict=True):
                    if not math.isnan(value):
                        results[index][name] = value
        return results

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """The features of images (PIL RGB, N of them) that `fid` compares: (N, D), float32, on the CPU.

        Raises:
            ValueError: If their network cannot be loaded.
        """
        return self.networks.get("fid")(images).cpu()
