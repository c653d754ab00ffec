"""Stage 4: CLIP embeddings of the images and of the edit prompts y_2 (Sec. 3.1), of unit length, as float16."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import BatchEncoding, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from .models import ModelStage, decode, load, place
from .options import EmbedOptions


def _unit(embeds: torch.Tensor) -> np.ndarray:
    return F.normalize(embeds.float(), dim=-1).half().cpu().numpy()


class EmbedImages(ModelStage):
    """Images in, embeddings out.

    Args:
        options (`EmbedOptions`): The CLIP model.
    """

    def __init__(self, options: EmbedOptions):
        self.processor = load(CLIPImageProcessorPil, options.clip_model, "clip")
        self.model = place(load(CLIPModel, options.clip_model, "clip"))
        self.dim = self.model.config.projection_dim

    def prepare(self, batch: dict[str, list]) -> dict:
        """`image` (B encoded images) -> what the model takes."""
        return self.processor(decode(batch["image"]), return_tensors="pt")

    @torch.inference_mode()
    def predict(self, inputs: dict) -> dict[str, np.ndarray]:
        """-> `embeds`, (B, D) float16, unit length."""
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        return {"embeds": _unit(self.model.get_image_features(pixel_values=pixel_values).pooler_output)}


class EmbedPrompts(ModelStage):
    """Edit prompts in, embeddings out; what CLIP cannot hold of a long prompt is cut off.

    Args:
        options (`EmbedOptions`): The CLIP model.
    """

    def __init__(self, options: EmbedOptions):
        self.tokenizer = load(CLIPTokenizer, options.clip_model, "clip")
        self.model = place(load(CLIPModel, options.clip_model, "clip"))
        self.dim = self.model.config.projection_dim

    def prepare(self, batch: dict[str, list]) -> BatchEncoding:
        """`edit_prompt` (B strings) -> what the model takes."""
        # Padding to one length, so that a prompt's embedding does not depend on its neighbours in the batch.
        return self.tokenizer(batch["edit_prompt"], padding="max_length", truncation=True, return_tensors="pt")

    @torch.inference_mode()
    def predict(self, inputs: BatchEncoding) -> dict[str, np.ndarray]:
        """-> `embeds`, (B, D) float16, unit length."""
        return {"embeds": _unit(self.model.get_text_features(**inputs.to(self.model.device)).pooler_output)}
