"""What an evaluation measures: `METRICS` names its metrics, and `Metrics` takes them from edited pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from PIL import Image

from .data import Example
from .metrics import (
    background_equal,
    clip_directional,
    clip_score,
    clip_similarity,
    edit_window,
    lpips,
    mse,
    psnr,
    shift,
    ssim,
    ssim_m,
    ssim_m_region,
    ssim_not_m,
    ssim_not_m_region,
    structure_distance,
    to_tensor,
)
from .networks import Networks


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
            edited_features, source_features = (network(image[None]) for image in pair)
            distances.append(lpips(edited_features, source_features, network.weights).cpu())
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
        # Asked only of batches in which every example has one, as `Metrics.measure` makes them; `target` too.
        asked = [example.thing for example in self.examples if example.thing is not None]
        answers = [[x == y for x, y in zip(*pair, strict=True)] for pair in zip(seen, asked, strict=True)]
        return torch.tensor(answers, dtype=torch.float).T

    @cached_property
    def target(self) -> torch.Tensor:
        return to_tensor([example.target for example in self.examples if example.target is not None])


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
        left_out (`list[str]`): For each network that could not be had: the metrics that are not taken, why, and the
            option that brings them in.

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
        self.left_out = []
        for part, reason in networks.missing.items():
            titles = ", ".join(info.title for info in METRICS.values() if part in info.needs)
            self.left_out.append(f"{titles}: {reason}")

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
        results: list[dict[str, float]] = [{} for _ in examples]
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
