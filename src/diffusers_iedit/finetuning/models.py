"""The models of a training: those of the losses, the parts that are trained, frozen encoders, the loss of a batch."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderTiny
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from .. import loading, mini
from ..losses import IEditLoss, VGG16Features, paired_loss
from ..pairs.models import load
from .families import Family


# What the loss takes by these names, if its terms need it.
LOSS_INPUTS = ("source_mask", "target_mask", "target_image", "prompt_embeds", "term_embeds")


def load_clip(model: str) -> tuple[CLIPModel, CLIPProcessor]:
    """CLIP for the losses "loc" and "global": a Hub id, a folder, or `mini`."""
    return load(CLIPModel, model, "clip"), load(CLIPProcessor, model, "clip")


def load_features(model: str) -> VGG16Features:
    """The network of Eq. 10: a Hub id, a folder, or `mini`.

    Raises:
        ValueError: If there is no such model, or if it is no VGG-16.
    """
    return VGG16Features.from_pretrained(model, argument="`perceptual_model`")


def load_decoder(model: str) -> AutoencoderTiny:
    """A decoder for the losses on images: a Hub id, a folder, or `mini`.

    Raises:
        ValueError: If there is no such model, or if it is no `AutoencoderTiny`.
    """
    return loading.load(AutoencoderTiny, model, "`loss_decoder`", mini.tiny_vae_path(), dtype=torch.float32)


def add_lora(family: Family, rank: int, train_blocks: str) -> None:
    """Freezes the model and adds LoRA layers of this rank to the attention layers of the blocks to train.

    Raises:
        ValueError: As `parameter_groups`.
    """
    from peft import LoraConfig

    parameter_groups(family, train_blocks)
    family.model.requires_grad_(False)
    parts = "|".join(family.part(part) for part in family.train_blocks[train_blocks])
    targets = rf"(?:{parts}).*{family.lora_layers}"
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    family.model.add_adapter(config)


def parameter_groups(
    family: Family, train_blocks: str, model: torch.nn.Module | None = None
) -> list[dict[str, torch.nn.Parameter]]:
    """The parameters to train, by name, in groups that take turns: step i trains group i modulo their number.

    After `add_lora` these are the LoRA layers, in the same groups. "alternate" is the paper's choice (Sec. 4.1): the
    input and the middle blocks in turn.

    Args:
        family ([`Family`]): With the model.
        train_blocks (`str`): One of the family's choices.
        model (`torch.nn.Module`, *optional*): What has taken the model's place.

    Raises:
        ValueError: If a group is empty, as of a transformer with too few blocks.
    """
    names = dict((family.model if model is None else model).named_parameters())
    with_lora = any("lora_" in name for name in names)
    groups = [
        {
            name: parameter
            for name, parameter in names.items()
            if re.match(family.part(part), name) and ("lora_" in name or not with_lora)
        }
        for part in family.train_blocks[train_blocks]
    ]
    if not all(groups):
        raise ValueError(f"`train_blocks` {train_blocks}: the {family.model_name} has no such blocks; all trains it.")
    return groups


class PairEncoder:
    """What the frozen VAE, text encoders and CLIP make of a batch of pairs, as far as the loss needs it.

    Args:
        family ([`Family`]): With VAE and text encoders.
        terms (`tuple[str]`): Of the loss, as for [`IEditLoss`].
        clip ([`~transformers.CLIPModel`], *optional*), clip_tokenizer (*optional*): For "loc" and "global".
        source_captions (`bool`): Whether the source captions are needed too.
    """

    def __init__(
        self,
        family: Family,
        terms: tuple[str, ...],
        clip: CLIPModel | None = None,
        clip_tokenizer: CLIPTokenizer | None = None,
        source_captions: bool = False,
    ):
        self.family = family
        self.needed = {name for term in terms for name in IEditLoss.NEEDS[term]}
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.source_captions = source_captions

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """tau_theta(y), as the pipeline computes it, in one or more tensors (B, ...)."""
        return self.family.encode_prompts(prompts)

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        # The terms that need it, "loc" and "global", come with a CLIP.
        assert self.clip is not None
        assert self.clip_tokenizer is not None
        tokens = self.clip_tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output

    @torch.no_grad()
    def __call__(self, batch: dict) -> dict[str, torch.Tensor]:
        """A collated batch of `PairStream` -> z_1, z_2, tau_theta(y_2) under names that begin with "prompt_", perhaps
        tau_theta(y_1) under "source_", and what the terms need of M_1, M_2, x_2, and the CLIP embeddings of y_2 and
        y_2^diff, on the models' device."""
        encoded = {
            f"{side}_latents": self.family.encode_images(batch[f"{side}_image"]) for side in ("source", "target")
        }
        captions = {"prompt": "edit_prompt"} | ({"source": "source_caption"} if self.source_captions else {})
        for prefix, column in captions.items():
            prompts = self.encode_prompts(batch[column])
            encoded |= {f"{prefix}_{name}": values for name, values in prompts.items()}
        for name in ("source_mask", "target_mask", "target_image"):
            if name in self.needed:
                encoded[name] = batch[name].to(encoded["source_latents"].device)
        if "prompt_embeds" in self.needed:
            encoded["prompt_embeds"] = self._embed_texts(batch["edit_prompt"])
        if "term_embeds" in self.needed:
            encoded["term_embeds"] = self._embed_texts(batch["target_term"])
        return encoded


def batch_loss(
    family: Family,
    model: torch.nn.Module,
    criterion: IEditLoss,
    encoded: dict[str, torch.Tensor],
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    empty_prompt: dict[str, torch.Tensor],
    drop_caption: torch.Tensor,
    snr_gamma: float | None = None,
    min_edit_timestep: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 12 for one batch: noise, prediction, loss.

    A sample whose caption is dropped trains the unconditional branch that classifier-free guidance starts from.
    Nothing asks for an edit there, so its loss is Eq. 1, weighted as the other terms of the noise: t/T.

    Args:
        family ([`Family`]): Knows the noise levels, and how the model is called.
        model: eps_theta, the family's, perhaps wrapped.
        criterion ([`IEditLoss`]): With the networks that its terms need.
        encoded (`dict`): What `PairEncoder` gives.
        timesteps (`torch.Tensor`), noise (`torch.Tensor`): t and eps_1, as from `draw_noise`.
        empty_prompt (`dict`): The empty prompt as `PairEncoder.encode_prompts` gives it, of batch size 1.
        drop_caption (`torch.Tensor`): Which samples are trained without their prompt, (B,), bool.
        snr_gamma (`float`, *optional*): Min-SNR weights (https://huggingface.co/papers/2303.09556) for the terms of
            the noise.
        min_edit_timestep (`int`): Samples below this timestep are trained on their source caption by Eq. 1, with
            weight 1. So little noise leaves nothing to edit: Eq. 3 asks for what cannot be reached from z_t.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The weighted sum and each term without its weight, all (B,).
    """
    source_latents, target_latents = encoded["source_latents"], encoded["target_latents"]
    device = source_latents.device
    timesteps, noise, drop_caption = timesteps.to(device), noise.to(device), drop_caption.to(device)

    level = family.noise_level(timesteps)
    noisy_latents = criterion.noise_latents(source_latents, noise, level)
    is_edit = timesteps >= min_edit_timestep
    prompt = {}
    for name, empty in empty_prompt.items():
        values, one_each = encoded[f"prompt_{name}"], (-1, *[1] * (empty.ndim - 1))
        if min_edit_timestep:
            values = torch.where(is_edit.view(one_each), values, encoded[f"source_{name}"])
        prompt[name] = torch.where(drop_caption.view(one_each), empty, values)
    model_pred = family.predict(model, noisy_latents, timesteps, **prompt)
    noise_weight = family.noise_weight(timesteps, snr_gamma)
    loss, terms = criterion(
        model_pred,
        noisy_latents,
        source_latents,
        target_latents,
        level,
        timesteps,
        **{name: encoded.get(name) for name in LOSS_INPUTS},
        noise_weight=noise_weight,
    )
    reconstruction = paired_loss(model_pred, criterion.target(noisy_latents, source_latents, level))
    unconditional = reconstruction * timesteps / criterion.num_train_timesteps
    if noise_weight is not None:
        unconditional = unconditional * noise_weight
    loss = torch.where(drop_caption, unconditional, loss)
    return torch.where(is_edit, loss, reconstruction), terms
