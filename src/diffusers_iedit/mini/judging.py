"""The judge: a small classifier that says which thing, colour and scene a picture of the mini world shows.

It takes part in no loss, so what it finds in an edit is evidence that the edit worked.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from .world import COLOURS, NOUNS, SCENES, SIZE


Region = Image.Image | Literal["left", "right"] | None


@dataclass(frozen=True)
class Verdict:
    """What the judge sees."""

    noun: str
    colour: str
    scene: str


def view(image: Image.Image, region: Region = None) -> Image.Image:
    """The part of a picture that the judge looks at, resized to SIZE x SIZE.

    Args:
        image: PIL RGB.
        region: a mask (PIL L) to look at the square around it; `"left"` or `"right"` for one half of a scene of two
            things; by default the whole picture.
    """
    width, height = image.size
    if region is None:
        box = (0, 0, width, height)
    elif isinstance(region, str):
        box = (0, 0, width // 2, height) if region == "left" else (width // 2, 0, width, height)
    else:
        bounds = region.getbbox()
        if bounds is None:
            raise ValueError("`region` is a mask without a white pixel, so there is nothing to look at.")
        left, top, right, bottom = bounds
        half = 0.6 * max(right - left, bottom - top)
        x, y = (left + right) / 2, (top + bottom) / 2
        box = (round(x - half), round(y - half), round(x + half), round(y + half))
    return image.crop(box).resize((SIZE, SIZE), Image.Resampling.BILINEAR)


class Judge(torch.nn.Module):
    """A plain convolutional network with one head for each question."""

    def __init__(self, channels: tuple[int, ...] = (24, 48, 96, 128)):
        super().__init__()
        layers = []
        for before, after in pairwise((3, *channels)):
            layers += [
                torch.nn.Conv2d(before, after, 3, stride=2, padding=1),
                torch.nn.GroupNorm(8, after),
                torch.nn.SiLU(),
            ]
            layers += [torch.nn.Conv2d(after, after, 3, padding=1), torch.nn.GroupNorm(8, after), torch.nn.SiLU()]
        self.features = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(16 * channels[-1], len(answers)) for answers in (NOUNS, COLOURS, SCENES)
        )

    def forward(self, views: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, 64, 64) in [-1, 1] -> logits over things, colours and scenes, each (B, n)."""
        features = self.features(views).flatten(1)
        return [head(features) for head in self.heads]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Judge:
        judge = cls()
        judge.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return judge.eval()

    @torch.no_grad()
    def look(self, images: list[Image.Image], regions: list[Region] | None = None) -> list[Verdict]:
        """Judges pictures, each in its region (see `view`)."""
        regions = regions or [None] * len(images)
        pixels = np.stack([np.asarray(view(image, region)) for image, region in zip(images, regions, strict=True)])
        views = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
        chosen = [logits.argmax(1).tolist() for logits in self(views.to(next(self.parameters()).device))]
        names = list(NOUNS), list(COLOURS), list(SCENES)
        return [
            Verdict(*(name[index] for name, index in zip(names, row, strict=True)))
            for row in zip(*chosen, strict=False)
        ]
