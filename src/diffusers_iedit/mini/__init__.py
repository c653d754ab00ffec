"""The mini world and the small models trained on it: see `world.py` for the pictures, `judging.py` for the judge."""

from pathlib import Path
from typing import Literal

from .world import (
    COLOURS,
    NOUNS,
    SCENES,
    SIZE,
    LargeScene,
    Scene,
    Thing,
    caption,
    captions,
    held_out_captions,
    held_out_combinations,
    render,
    render_large,
)


__all__ = [
    "COLOURS",
    "NOUNS",
    "SCENES",
    "SIZE",
    "LargeScene",
    "Scene",
    "Thing",
    "base_unet_path",
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
    "render_large",
    "sd3_iedit_path",
    "tiny_vae_path",
    "vgg_path",
]


def model_path(name: Literal["iedit", "sd3"] = "iedit") -> Path:
    """The folder of a mini pipeline.

    Args:
        name: `"iedit"`, for `IEditPipeline.from_pretrained`; or `"sd3"`, a flow-matching model of the same world, for
            `StableDiffusion3Img2ImgPipeline.from_pretrained`.

    Raises:
        ValueError: If there is no such pipeline.
    """
    folders = {"iedit": "model", "sd3": "sd3"}
    if name not in folders:
        raise ValueError(f"`name` has to be one of {', '.join(map(repr, folders))}, but is {name!r}.")
    return Path(__file__).parent / folders[name]


def base_unet_path() -> Path:
    """The folder of the UNet before it was fine-tuned as iEdit: with it, the mini pipeline is plain SDEdit."""
    return Path(__file__).parent / "base_unet"


def sd3_iedit_path() -> Path:
    """The folder of the transformer of `model_path("sd3")` after it was fine-tuned as iEdit, an
    `SD3Transformer2DModel`."""
    return Path(__file__).parent / "sd3_iedit"


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


def vgg_path() -> Path:
    """The folder of the mini VGG-16, a quarter as wide as the original, for `losses.VGG16Features.from_pretrained`."""
    return Path(__file__).parent / "vgg"


def tiny_vae_path() -> Path:
    """The folder of the mini `AutoencoderTiny`, which decodes the mini pipeline's latents at a third of the cost."""
    return Path(__file__).parent / "tiny_vae"
