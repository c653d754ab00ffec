"""Stage 2: BLIP writes the source caption y_1 of every image (Sec. 3.1)."""

from __future__ import annotations

import re

import torch
from transformers import BlipForConditionalGeneration, BlipProcessor

from .models import ModelStage, decode, load, place
from .options import CaptionOptions


# BLIP-large writes words that are none ("arafed woman in a red dress", "araffe"), but Arafat is a name.
_NO_WORDS = re.compile(r"\baraf(?!at)[a-z]*\b", re.IGNORECASE)


class CaptionImages(ModelStage):
    """Images in, captions out.

    Args:
        options (`CaptionOptions`): The model and how it is sampled.
    """

    def __init__(self, options: CaptionOptions):
        self.options = options
        self.processor = load(BlipProcessor, options.caption_model, "captioner")
        self.model = place(load(BlipForConditionalGeneration, options.caption_model, "captioner"))

    def prepare(self, batch: dict[str, list]) -> dict:
        """`image` (B encoded images) -> what the model takes."""
        return self.processor(images=decode(batch["image"]), return_tensors="pt")

    @torch.inference_mode()
    def predict(self, inputs: dict) -> dict[str, list]:
        """-> `caption` (B strings)."""
        pixel_values = inputs["pixel_values"].to(self.model.device, self.model.dtype)
        token_ids = self.model.generate(
            pixel_values=pixel_values,
            max_new_tokens=self.options.max_new_tokens,
            num_beams=self.options.num_beams,
            # Whatever the model's own settings say: the same image has to get the same caption.
            do_sample=False,
        )
        captions = self.processor.batch_decode(token_ids, skip_special_tokens=True)
        return {"caption": [clean_caption(caption) for caption in captions]}


def clean_caption(caption: str) -> str:
    """A caption of BLIP without the non-words that it sometimes begins with."""
    return " ".join(_NO_WORDS.sub("", caption).split())
