"""The networks behind the metrics, each loaded by name when it is needed: a Hub id, a folder, or `mini`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from importlib.resources import files
from typing import Literal, overload

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPModel, CLIPProcessor, ViTModel

from .. import mini
from ..loading import load
from ..losses import CLIPImageEmbedder, VGG16Features
from ..mini.judging import Judge, view
from .inception import Inception
from .metrics import to_tensor


logger = logging.getLogger(__name__)

DEFAULT_MODELS = {
    "clip": "openai/clip-vit-large-patch14",
    "fid": "timm/inception_v3.tv_in1k",
    "lpips": "timm/vgg16.tv_in1k",
    "dino": "facebook/dino-vitb8",
}
"""By the part that they play."""


class CLIPEmbedder(nn.Module):
    """Both halves of CLIP. No words are put before a text: "a photo depicts" and the like change the scores.

    Args:
        model (`str`): A Hub id, a folder, or `mini`.

    Raises:
        ValueError: If there is no such model, or it is no CLIP.
    """

    def __init__(self, model: str):
        super().__init__()
        processor = load(CLIPProcessor, model, "`model`", mini.clip_path())
        self.tokenizer = processor.tokenizer
        self.images = CLIPImageEmbedder(load(CLIPModel, model, "`model`", mini.clip_path()), processor.image_processor)

    def embed_images(self, *images: torch.Tensor) -> torch.Tensor:
        """Any number of batches (B, 3, H, W) in [0, 1] -> (sum of all B, D). CLIP sees the square in the middle."""
        pixels = torch.cat([self.images.preprocess(batch) for batch in images])
        return self.images.clip.get_image_features(pixels).pooler_output

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """-> (B, D); what CLIP cannot hold of a long text is cut off."""
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return self.images.clip.get_text_features(**tokens.to(self.images.clip.device)).pooler_output


class LPIPSFeatures(nn.Module):
    """VGG-16 with the linear weights of LPIPS (https://huggingface.co/papers/1801.03924), version 0.1.

    Args:
        model (`str`): Of VGG-16, as for `VGG16Features.from_pretrained`. Its normalisation of the images is that of
            LPIPS, written for [0, 1] instead of [-1, 1].

    Attributes:
        weights (`list[torch.Tensor]`): Of the layers' channels, each (C,).

    Raises:
        ValueError: If there is no such model, or its layers are not as wide as the weights.
    """

    LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")

    def __init__(self, model: str):
        super().__init__()
        self.vgg = VGG16Features.from_pretrained(model, layers=self.LAYERS, normalize=False)
        # The one file with a pickle that is read, because torchmetrics brings it; nothing but tensors is let in.
        file = files("torchmetrics") / "functional" / "image" / "lpips_models" / "vgg.pth"
        loaded = torch.load(str(file), map_location="cpu", weights_only=True)
        for number in range(len(self.LAYERS)):
            self.register_buffer(f"weight_{number}", loaded[f"lin{number}.model.1.weight"].flatten())
        width = self.vgg.features[0].out_channels
        expected = len(self.weights[0])
        if width != expected:
            raise ValueError(f"{model!r} has {width} channels in its first layer, but LPIPS is for {expected}.")

    @property
    def weights(self) -> list[torch.Tensor]:
        return [getattr(self, f"weight_{number}") for number in range(len(self.LAYERS))]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> the activations of the layers, each (B, C, H', W')."""
        return self.vgg(images)


class StructureKeys(nn.Module):
    """The keys of the last layer of a DINO-ViT, in whose self-similarity is the structure of a picture.

    As in Tumanyan et al., https://huggingface.co/papers/2201.00424: the shorter side becomes 224 pixels (the longer
    one 480 at most), and the class token counts too.

    Args:
        model (`str`): A Hub id or a folder, for [`~transformers.ViTModel`].

    Raises:
        ValueError: If there is no such model, or weights are missing.
    """

    SHORTER, LONGER = 224, 480

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: str):
        super().__init__()
        self.vit = load(ViTModel, model, "`model`", add_pooling_layer=False)
        self.eval().requires_grad_(False)
        self.vit.layers[-1].attention.k_proj.register_forward_hook(self._keep)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def _keep(self, module, inputs, output: torch.Tensor) -> None:
        self.keys = output

    def forward(self, images: torch.Tensor, antialias: bool = True) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] -> keys (B, tokens, D), the heads side by side."""
        sides = images.shape[-2:]
        scale = min(self.SHORTER / min(sides), self.LONGER / max(sides))
        # 224 may come out a little below.
        size = [int(scale * side + 1e-6) for side in sides]
        images = F.interpolate(images, size, mode="bilinear", antialias=antialias)
        self.vit((images - self.mean) / self.std, interpolate_pos_encoding=True)
        return self.keys


class Networks:
    """The networks behind the metrics; each is loaded when it is asked for first.

    Args:
        models (`dict[str, str]`, *optional*): Of the parts "clip", "fid", "lpips" and "dino" those that are not to be
            as in `DEFAULT_MODELS`: a Hub id, a folder, or `mini`. In the mini world, CLIP is the mini CLIP, FID
            compares features of the judge, and there is nothing for LPIPS and for the structure distance.
        device (`str` or `torch.device`): Where they run.

    Attributes:
        missing (`dict[str, str]`): For the parts that were not found: why, and the option that brings them in.

    Raises:
        ValueError: If there is no such part.
    """

    def __init__(self, models: dict[str, str] | None = None, device: str | torch.device = "cpu"):
        self._chosen = models or {}
        if unknown := sorted(set(self._chosen) - set(DEFAULT_MODELS)):
            raise ValueError(f"`models` has to name some of {', '.join(DEFAULT_MODELS)}, got {', '.join(unknown)}.")
        self.models = DEFAULT_MODELS | self._chosen
        self.device = torch.device(device)
        self._loaded: dict[str, Callable | None] = {}
        self.missing: dict[str, str] = {}

    @cached_property
    def judge(self) -> Judge:
        """What judges pictures of the mini world."""
        return Judge.from_pretrained(mini.judge_path()).to(self.device)

    @overload
    def get(self, part: Literal["clip"]) -> CLIPEmbedder: ...
    @overload
    def get(self, part: Literal["lpips"]) -> LPIPSFeatures: ...
    @overload
    def get(self, part: str) -> Callable: ...
    def get(self, part: str) -> Callable:
        """The network of this part.

        Returns:
            [`CLIPEmbedder`], [`LPIPSFeatures`] or [`StructureKeys`]; for "fid" a function of a list of PIL images that
            returns their features (N, D).

        Raises:
            ValueError: If it cannot be loaded.
        """
        network = self._loaded.get(part)
        if network is None:
            try:
                network = self._loaded[part] = self._load(part, self.models[part])
            except ValueError as error:
                raise ValueError(f"The network for {part}: {error}") from error
        return network

    def find(self, part: str) -> Callable | None:
        """As `get`, but what was not chosen may be missing: this is logged and in `missing`, and the result is None.

        Raises:
            ValueError: If a model that was chosen cannot be loaded.
        """
        if part not in self._loaded:
            try:
                self.get(part)
            except ValueError as error:
                if self._chosen.get(part, "mini") != "mini":
                    raise
                self.missing[part] = f"{str(error).rstrip('.')}. --networks {part}=NAME brings them in."
                logger.warning("Metrics are left out. %s", self.missing[part])
                self._loaded[part] = None
        return self._loaded[part]

    def _load(self, part: str, model: str) -> Callable:
        if part == "clip":
            return CLIPEmbedder(model).to(self.device)
        if part == "fid":
            return self._judge_features if model == "mini" else self._inception_features(model)
        if model == "mini":
            raise ValueError("the mini world has none.")
        return {"lpips": LPIPSFeatures, "dino": StructureKeys}[part](model).to(self.device)

    def _judge_features(self, images: list[Image.Image]) -> torch.Tensor:
        views = to_tensor([view(image) for image in images]).to(self.device)
        return self.judge.features(2 * views - 1).mean((2, 3))

    def _inception_features(self, model: str) -> Callable:
        inception = Inception.from_pretrained(model).to(self.device)

        def features(images: list[Image.Image]) -> torch.Tensor:
            return inception(torch.cat([inception.preprocess(to_tensor([i]).to(self.device)) for i in images]))

        return features
