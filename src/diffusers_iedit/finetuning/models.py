"""The models of a training: loading them, the parts that are trained, the frozen encoders, the loss of one batch."""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from .. import loading, mini
from ..losses import IEditLoss, VGG16Features, paired_loss
from ..pairs.models import load
from ..pipeline import IEditPipeline
from .options import TRAIN_BLOCKS


# Of each part of the UNet, how the names of its parameters begin.
_PARTS = {
    "input": r"(conv_in|down_blocks)\.",
    "middle": r"mid_block\.",
    "all": r"",
    "attention": r".*\.attn[12]\.",
}

# What the loss takes by these names, if its terms need it.
LOSS_INPUTS = ("source_mask", "target_mask", "target_image", "prompt_embeds", "term_embeds")


def load_base(model: str) -> IEditPipeline:
    """The pipeline to fine-tune, in fp32: a Hub id, a folder, `mini`, or `mini-base`, from which `mini` was trained.

    Raises:
        ValueError: If there is no such model, if it is no Stable Diffusion 1.x or 2.x, or if it is not all there.
    """
    kind = "Stable Diffusion 1.x or 2.x"
    return loading.load_pipeline(IEditPipeline, model, "`model`", kind, dtype=torch.float32)


def native_resolution(pipe: IEditPipeline) -> int:
    """The pixels, in the shorter direction, of the pictures that a base was made for."""
    size = pipe.unet.config.sample_size
    return pipe.vae_scale_factor * (size if isinstance(size, int) else min(size))


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


def add_lora(unet: UNet2DConditionModel, rank: int, train_blocks: str) -> None:
    """Freezes the UNet and adds LoRA layers of this rank to the attention layers of the blocks to train."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    parts = "|".join(_PARTS[part] for part in TRAIN_BLOCKS[train_blocks])
    targets = rf"(?:{parts}).*(to_q|to_k|to_v|to_out\.0)"
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
    unet.add_adapter(config)


def parameter_groups(unet: UNet2DConditionModel, train_blocks: str) -> list[dict[str, torch.nn.Parameter]]:
    """The parameters to train, by name, in groups that take turns: step i trains group i modulo their number.

    After `add_lora` these are the LoRA layers, in the same groups. "alternate" is the paper's choice (Sec. 4.1): the
    input and the middle blocks in turn.

    Raises:
        ValueError: If `train_blocks` is unknown.
    """
    if train_blocks not in TRAIN_BLOCKS:
        raise ValueError(f"`train_blocks` has to be one of {', '.join(TRAIN_BLOCKS)}, got {train_blocks!r}.")
    names = dict(unet.named_parameters())
    with_lora = any("lora_" in name for name in names)
    return [
        {
            name: parameter
            for name, parameter in names.items()
            if re.match(_PARTS[part], name) and ("lora_" in name or not with_lora)
        }
        for part in TRAIN_BLOCKS[train_blocks]
    ]


class PairEncoder:
    """What the frozen VAE, text encoder and CLIP make of a batch of pairs, as far as the loss needs it.

    Args:
        vae ([`AutoencoderKL`]): Encodes in its own precision, outside of autocast: in fp16 it overflows.
        text_encoder ([`~transformers.CLIPTextModel`]), tokenizer ([`~transformers.CLIPTokenizer`]): Of the pipeline.
        terms (`tuple[str]`): Of the loss, as for [`IEditLoss`].
        clip ([`~transformers.CLIPModel`], *optional*), clip_tokenizer (*optional*): For "loc" and "global".
        source_captions (`bool`): Whether the states of the source captions are needed too.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        terms: tuple[str, ...],
        clip: CLIPModel | None = None,
        clip_tokenizer: CLIPTokenizer | None = None,
        source_captions: bool = False,
    ):
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.needed = {name for term in terms for name in IEditLoss.NEEDS[term]}
        self.clip = clip
        self.clip_tokenizer = clip_tokenizer
        self.source_captions = source_captions

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> torch.Tensor:
        """tau_theta(y), as the pipeline computes it: (B, tokens, D)."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.text_encoder.device))[0]

    def _embed_texts(self, texts: list[str]) -> torch.Tensor:
        # The terms that need it, "loc" and "global", come with a CLIP.
        assert self.clip is not None
        assert self.clip_tokenizer is not None
        tokens = self.clip_tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.vae.device, self.vae.dtype)
        with torch.autocast(images.device.type, enabled=False):
            return self.vae.encode(2 * images - 1).latent_dist.mode() * self.vae.config.scaling_factor

    @torch.no_grad()
    def __call__(self, batch: dict) -> dict[str, torch.Tensor]:
        """A collated batch of `PairStream` -> z_1, z_2, the prompts' states, and what the terms need of M_1, M_2, x_2,
        and the CLIP embeddings of y_2 and y_2^diff, on the models' device."""
        encoded = {
            "source_latents": self._encode_images(batch["source_image"]),
            "target_latents": self._encode_images(batch["target_image"]),
            "prompt_states": self.encode_prompts(batch["edit_prompt"]),
        }
        if self.source_captions:
            encoded["source_states"] = self.encode_prompts(batch["source_caption"])
        for name in ("source_mask", "target_mask", "target_image"):
            if name in self.needed:
                encoded[name] = batch[name].to(self.vae.device)
        if "prompt_embeds" in self.needed:
            encoded["prompt_embeds"] = self._embed_texts(batch["edit_prompt"])
        if "term_embeds" in self.needed:
            encoded["term_embeds"] = self._embed_texts(batch["target_term"])
        return encoded


def batch_loss(
    unet: torch.nn.Module,
    criterion: IEditLoss,
    scheduler: DDPMScheduler,
    encoded: dict[str, torch.Tensor],
    timesteps: torch.Tensor,
    noise: torch.Tensor,
    empty_states: torch.Tensor,
    drop_caption: torch.Tensor,
    snr_gamma: float | None = None,
    min_edit_timestep: int = 0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Eq. 12 for one batch: noise, prediction, loss.

    A sample whose caption is dropped trains the unconditional branch that classifier-free guidance starts from.
    Nothing asks for an edit there, so its loss is Eq. 1, weighted as the other terms of the noise: t/T.

    Args:
        unet: eps_theta.
        criterion ([`IEditLoss`]): With the networks that its terms need.
        scheduler ([`DDPMScheduler`]): Its `alphas_cumprod` are the noise levels.
        encoded (`dict`): What `PairEncoder` gives.
        timesteps (`torch.Tensor`), noise (`torch.Tensor`): t and eps_1, as from `draw_noise`.
        empty_states (`torch.Tensor`): The states of the empty prompt, (1, tokens, D).
        drop_caption (`torch.Tensor`): Which samples are trained without their prompt, (B,), bool.
        snr_gamma (`float`, *optional*): Min-SNR weights (https://huggingface.co/papers/2303.09556) for the terms of
            the noise.
        min_edit_timestep (`int`): Samples below this timestep are trained on their source caption by Eq. 1, with
            weight 1. So little noise leaves nothing to edit: Eq. 3 asks for what cannot be reached from z_t.

    Returns:
        `tuple[torch.Tensor, dict[str, torch.Tensor]]`: The weighted sum and each term without its weight, all (B,).
    """
    prompt_states, source_latents, target_latents = (
        encoded[name] for name in ("prompt_states", "source_latents", "target_latents")
    )
    device = source_latents.device
    timesteps, noise, drop_caption = timesteps.to(device), noise.to(device), drop_caption.to(device)

    level = scheduler.alphas_cumprod.to(device)[timesteps]
    noisy_latents = criterion.noise_latents(source_latents, noise, level)
    states, is_edit = prompt_states, timesteps >= min_edit_timestep
    if min_edit_timestep:
        states = torch.where(is_edit.view(-1, 1, 1), prompt_states, encoded["source_states"])
    states = torch.where(drop_caption.view(-1, 1, 1), empty_states, states)
    model_pred = unet(noisy_latents, timesteps, states, return_dict=False)[0]
    noise_weight = None
    if snr_gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        v_prediction = scheduler.config.prediction_type == "v_prediction"
        noise_weight = snr.clamp(max=snr_gamma) / (snr + 1 if v_prediction else snr)
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
