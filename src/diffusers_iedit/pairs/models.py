"""What the stages with a model share: their three steps, loading it by Hub id, folder or `mini`, decoding images."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from .. import mini
from ..images import open_image


# Of each part the option that names it, and the one that the package ships.
_PARTS = {
    "captioner": ("caption_model", mini.captioner_path),
    "clip": ("clip_model", mini.clip_path),
    "mask_model": ("mask_model", mini.mask_model_path),
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


def resolve(model: str, part: str) -> str:
    """The Hub id or folder that a model's name stands for: `mini` is the one of that part that the package ships."""
    return str(_PARTS[part][1]()) if model == "mini" else model


def load(cls, model: str, part: str):
    """`cls.from_pretrained`, from safetensors only, without any code from the Hub.

    Args:
        cls (`type`): A model, processor or tokenizer class of transformers.
        model (`str`): A Hub id, a folder or `mini`.
        part (`str`): "captioner", "clip" or "mask_model".

    Raises:
        ValueError: If there is no such model, or if it is not all there.
    """
    try:
        if issubclass(cls, torch.nn.Module):
            loaded, report = cls.from_pretrained(resolve(model, part), use_safetensors=True, output_loading_info=True)
            # transformers fills up what is missing at random and goes on.
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"{len(missing)} of its weights are missing, for instance {missing[0]}")
            return loaded
        loaded = cls.from_pretrained(resolve(model, part))
        tokenizer = getattr(loaded, "tokenizer", loaded)
        # Where there are no files transformers makes a tokenizer without a single word.
        if isinstance(tokenizer, PreTrainedTokenizerBase) and len(tokenizer) == len(tokenizer.all_special_tokens):
            raise ValueError("the tokenizer's files are missing")
        return loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unusable(model, part, cls.__name__, error) from error


def _unusable(model: str, part: str, kind: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"`{_PARTS[part][0]}` {model!r}: no folder and no Hub id gives a usable {kind}: {reason}")


def place(model: torch.nn.Module) -> torch.nn.Module:
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
    folder = Path(resolve(model, part))
    if not folder.is_dir():
        try:
            snapshot = snapshot_download(model, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        except (OSError, ValueError) as error:
            raise _unusable(model, part, "model", error) from error
        return f"commit {Path(snapshot).name}"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".txt", ".safetensors"):
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            with file.open("rb") as opened:
                while chunk := opened.read(2**20):
                    digest.update(chunk)
    return f"sha256 {digest.hexdigest()[:16]}"
