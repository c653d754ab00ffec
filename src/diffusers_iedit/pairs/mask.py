"""Stage 6: CLIPSeg masks M_1 of the source term and M_2 of the target term (Sec. 3.4), and the pairs they rule out."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from ..masking_iedit import clean_term
from .models import ModelStage, decode, load, place
from .options import SegmentOptions


GRID = 64
"""Masks are compared on a square grid of this side, as training squares the images."""


class SegmentTerms(ModelStage):
    """Images and the term that each is searched for in, masks out.

    Args:
        options (`SegmentOptions`): The model and its threshold.
    """

    def __init__(self, options: SegmentOptions):
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


def unfit_mask(grid: np.ndarray, options: SegmentOptions) -> str | None:
    """Why a mask rules out its pair: "empty", "full" or None."""
    area = grid.mean()
    if area < options.min_mask_area or not grid.any():
        return "empty"
    return "full" if area > options.max_mask_area else None
