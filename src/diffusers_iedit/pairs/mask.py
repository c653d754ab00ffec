"""Stage 6: CLIPSeg masks M_1 of the source term and M_2 of the target term (Sec. 3.4), and the pairs they rule out."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from ..masking_iedit import clean_term
from .models import ModelStage, decode, load, place


GRID = 64
"""Masks are compared on a square grid of this side, as training squares the images."""


@dataclass
class MaskOptions:
    """Stage 6, mask: where a pair differs, and which pairs are kept."""

    mask_model: str = field(default="CIDAS/clipseg-rd64-refined", metadata={"help": "CLIPSeg: Hub id, folder or mini"})
    mask_threshold: float = field(default=0.5, metadata={"help": "probability above which a pixel belongs to a mask"})
    min_mask_area: float = field(
        default=0.005, metadata={"help": "drop pairs with a mask below this share of its image: nothing was found"}
    )
    max_mask_area: float = field(
        default=0.9, metadata={"help": "drop pairs with a mask above this share of its image: nothing is left to keep"}
    )
    rerank_by_mask: bool = field(
        default=False,
        metadata={"help": "of the nearest neighbours take the one whose mask overlaps the source's best"},
    )
    min_mask_iou: float = field(
        default=0.0,
        metadata={"help": "drop pairs whose masks overlap less (IoU): the loss with masks harms on such pairs"},
    )

    def __post_init__(self):
        if not 0 <= self.mask_threshold < 1:
            raise ValueError(f"`mask_threshold` has to be a probability in [0, 1), but is {self.mask_threshold}.")
        if not 0 <= self.min_mask_area < self.max_mask_area <= 1:
            raise ValueError(
                "`min_mask_area` and `max_mask_area` have to be shares with 0 <= min < max <= 1, but are"
                f" {self.min_mask_area} and {self.max_mask_area}."
            )
        if not 0 <= self.min_mask_iou <= 1:
            raise ValueError(f"`min_mask_iou` has to lie in [0, 1], but is {self.min_mask_iou}.")


class SegmentTerms(ModelStage):
    """Images and the term that each is searched for in, masks out.

    Args:
        options (`MaskOptions`): The model and its threshold.
    """

    def __init__(self, options: MaskOptions):
        self.threshold = options.mask_threshold
        self.processor = load(CLIPSegProcessor, options.mask_model, "mask_model")
        self.model = place(load(CLIPSegForImageSegmentation, options.mask_model, "mask_model"))

    def prepare(self, batch: dict[str, list]) -> dict:
        """`image` (B encoded images) and `term` (B strings) -> what the model takes, and the images' sizes."""
        images = decode(batch["image"])
        # Padding to one length, so that a mask does not depend on its neighbours in the batch.
        terms = [clean_term(term) for term in batch["term"]]
        inputs = self.processor(text=terms, images=images, padding="max_length", truncation=True, return_tensors="pt")
        return {"inputs": inputs, "sizes": [(image.height, image.width) for image in images]}

    @torch.inference_mode()
    def predict(self, prepared: dict) -> dict:
        """-> logits on CLIPSeg's grid, and the images' sizes."""
        inputs = prepared["inputs"].to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        logits = self.model(**inputs).logits.float().cpu()
        return {"logits": logits.reshape(len(prepared["sizes"]), 1, *logits.shape[-2:]), "sizes": prepared["sizes"]}

    @torch.inference_mode()
    def finish(self, predicted: dict) -> dict[str, list]:
        """-> `mask` (B PNG files, 255 = the term, as large as the image), `grid` (B arrays (GRID, GRID), bool)."""
        # A probability above the threshold is a logit above the threshold's.
        threshold = torch.logit(torch.tensor(self.threshold)).item()
        masks, grids = [], []
        for logit, size in zip(predicted["logits"], predicted["sizes"], strict=True):
            mask = (F.interpolate(logit[None], size=size, mode="bilinear") > threshold).to(torch.uint8) * 255
            file = io.BytesIO()
            Image.fromarray(mask[0, 0].numpy()).save(file, "PNG")
            masks.append(file.getvalue())
            # Pixels of the mask itself, so that a mask is not black if its grid is not.
            grids.append(F.interpolate(mask, size=(GRID, GRID), mode="nearest-exact")[0, 0].numpy() > 0)
        return {"mask": masks, "grid": grids}


def mask_iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two bool arrays; 0 if both are empty."""
    return float((mask & other).sum() / max((mask | other).sum(), 1))


def unfit_mask(grid: np.ndarray, options: MaskOptions) -> str | None:
    """Why a mask rules out its pair: "empty", "full" or None."""
    area = grid.mean()
    if area < options.min_mask_area or not grid.any():
        return "empty"
    return "full" if area > options.max_mask_area else None
