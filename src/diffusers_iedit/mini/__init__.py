"""The mini world and the small models trained on it: see `world.py` for the pictures, `judging.py` for the judge."""

from pathlib import Path

from .world import (
    COLOURS,
    NOUNS,
    SCENES,
    SIZE,
    Scene,
    Thing,
    caption,
    captions,
    held_out_captions,
    held_out_combinations,
    render,
)


__all__ = [
    "COLOURS",
    "NOUNS",
    "SCENES",
    "SIZE",
    "Scene",
    "Thing",
    "caption",
    "captioner_path",
    "captions",
    "clip_path",
    "held_out_captions",
    "held_out_combinations",
    "judge_path",
    "mask_model_path",
    "model_path",
    "render",
]


def model_path() -> Path:
    """The folder of the mini pipeline, for `IEditPipeline.from_pretrained`."""
    return Path(__file__).parent / "model"


def mask_model_path() -> Path:
    """The folder of the mini CLIPSeg with its processor, for `CLIPSegForImageSegmentation` and `CLIPSegProcessor`."""
    return model_path() / "mask_model"


def captioner_path() -> Path:
    """The folder of the mini BLIP with its processor, for `BlipForConditionalGeneration` and `BlipProcessor`."""
    return model_path() / "captioner"


def clip_path() -> Path:
    """The folder of the whole mini CLIP (image and text tower), for `CLIPModel` and `CLIPProcessor`."""
    return Path(__file__).parent / "clip"


def judge_path() -> Path:
    """The folder of the judge, the classifier that decides whether an edit shows what was asked for."""
    return Path(__file__).parent / "judge"
