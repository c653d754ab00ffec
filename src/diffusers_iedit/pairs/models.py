"""What the stages with a model share: their three steps, loading it by Hub id, folder or `mini`, decoding images."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from PIL import Image

from .. import loading, mini
from ..images import open_image


Model = TypeVar("Model", bound=torch.nn.Module)

# Of each part the option that names it, and the one that the package ships.
_PARTS = {
    "captioner": ("`caption_model`", mini.captioner_path()),
    "clip": ("`clip_model`", mini.clip_path()),
    "mask_model": ("`mask_model`", mini.mask_model_path()),
}


class ModelStage:
    """A stage with a model. `prepare` and `finish` are work for the CPU, which runs beside the model's."""

    def prepare(self, batch: dict[str, list]) -> dict:
        """Columns of a batch -> what `predict` takes."""
        raise NotImplementedError

    def predict(self, inputs: dict) -> dict:
        """Runs the model."""
        raise NotImplementedError

    def finish(self, outputs: dict) -> dict[str, list]:
        """What `predict` gave -> new columns."""
        return outputs

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        return self.finish(self.predict(self.prepare(batch)))


def load(cls: type, model: str, part: str):
    """As [`~diffusers_iedit.loading.load`], for one of the builder's models.

    Args:
        cls (`type`): A model, processor or tokenizer class of transformers.
        model (`str`): A Hub id, a folder or `mini`.
        part (`str`): "captioner", "clip" or "mask_model".

    Raises:
        ValueError: If there is no such model, or if it is not all there.
    """
    return loading.load(cls, model, *_PARTS[part])


def place(model: Model) -> Model:
    """The model on this process's device, ready to predict: in half precision on a GPU, which halves its time."""
    device = PartialState().device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    return model.eval().requires_grad_(False).to(device, dtype)


def decode(images: list[bytes]) -> list[Image.Image]:
    """Encoded images as PIL RGB."""
    return [open_image(image).convert("RGB") for image in images]


def fingerprint(model: str, part: str) -> str:
    """What tells one version of a model from another: the commit of a Hub id, the hash of a folder's files.

    Raises:
        ValueError: If there is no such model.
    """
    argument, shipped = _PARTS[part]
    folder = loading.fetch(model, argument, shipped)
    if model != "mini" and not Path(model).is_dir():
        return f"commit {folder.name}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".safetensors"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as opened:
                while chunk := opened.read(2**20):
                    digest.update(chunk)
    return f"sha256 {digest.hexdigest()[:16]}"
