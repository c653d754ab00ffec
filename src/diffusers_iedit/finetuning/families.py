"""The families of models that can be fine-tuned: one class each, and all that differs between them stands here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from diffusers.utils import convert_state_dict_to_diffusers

from .. import loading
from ..editor import LocalEditor
from ..pipeline import IEditPipeline


class Family:
    """A pipeline as its training sees it: which model is trained, what it is given, and what it predicts.

    Args:
        pipe ([`DiffusionPipeline`]): Of the family's `pipeline_class`.

    Attributes:
        kind (`str`): What the family is, in the words of an error.
        pipeline_class (`type`): Of what is loaded, and saved at the end.
        model_name (`str`): The component that is trained.
        prediction_type (`str`): What it predicts, as for [`~diffusers_iedit.losses.IEditLoss`].
        num_train_timesteps (`int`): T.
        train_blocks (`dict`): Its choices of `train_blocks`, each with the parts that take turns.
        lora_layers (`str`): A pattern of the layers that get LoRA layers.
    """

    kind: str
    pipeline_class: type[DiffusionPipeline]
    model_name: str
    train_blocks: dict[str, tuple[str, ...]]
    lora_layers: str
    # Where the options leave it open.
    resolution: int
    lora_rank: int | None = None

    prediction_type: str
    num_train_timesteps: int

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe: Any = pipe

    @staticmethod
    def fits(index: dict) -> bool:
        """Whether a `model_index.json` is one of the family's."""
        raise NotImplementedError

    @property
    def model(self) -> Any:
        """What is trained."""
        return getattr(self.pipe, self.model_name)

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """All of them; they stay as they are."""
        names = ("text_encoder", "text_encoder_2", "text_encoder_3")
        return [encoder for name in names if (encoder := getattr(self.pipe, name, None)) is not None]

    @property
    def native_resolution(self) -> int:
        """The pixels, in the shorter direction, of the pictures that the base was made for."""
        size = self.model.config.sample_size
        if size is None:
            return self.resolution
        return self.pipe.vae_scale_factor * (size if isinstance(size, int) else min(size))

    @property
    def multiple(self) -> int:
        """What the sides of the pictures have to be multiples of, in pixels."""
        return self.pipe.vae_scale_factor

    def settle(self, args: argparse.Namespace) -> None:
        """Fills in what the command line leaves to the family, and checks what it says.

        Raises:
            ValueError: For an option that the family does not have.
        """
        if args.train_blocks not in self.train_blocks:
            raise ValueError(
                f"`train_blocks` {args.train_blocks} is no part of a {self.kind}, which has"
                f" {', '.join(self.train_blocks)}."
            )
        if args.lora_rank is None:
            args.lora_rank = self.lora_rank
        # 0 asks for none.
        args.lora_rank = args.lora_rank or None
        if args.resolution is None:
            args.resolution = min(self.native_resolution, self.resolution)

    def part(self, name: str) -> str:
        """A pattern of the names of the parameters of one part out of `train_blocks`."""
        raise NotImplementedError

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> latents (B, C, h, w), as the model sees them.

        In the VAE's own precision, outside of autocast: in fp16 it overflows.
        """
        vae = self.pipe.vae
        images = images.to(vae.device, vae.dtype)
        with torch.autocast(images.device.type, enabled=False):
            latents = vae.encode(2 * images - 1).latent_dist.mode()
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """tau_theta(y), as the pipeline computes it: what `predict` takes, each (B, ...)."""
        raise NotImplementedError

    def draw_timestep(self, generator: torch.Generator) -> torch.Tensor:
        """One t, as a tensor without dimensions."""
        raise NotImplementedError

    def noise_level(self, timesteps: torch.Tensor) -> torch.Tensor:
        """How much noise there is at t, (B,), as the equations in `losses.py` take it."""
        raise NotImplementedError

    def noise_weight(self, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor | None:
        """A weight of the losses on what the model predicts beside t/T, (B,), if there is any."""
        raise NotImplementedError

    def predict(
        self, model: torch.nn.Module, noisy_latents: torch.Tensor, timesteps: torch.Tensor, **prompt: torch.Tensor
    ) -> torch.Tensor:
        """What the model predicts at z_t, t and y, (B, C, h, w)."""
        raise NotImplementedError

    def lora_state(self) -> dict[str, Any]:
        """The LoRA layers of the model, as an argument of `save_lora_weights`."""
        raise NotImplementedError

    def editor(self, device: torch.device) -> Any:
        """What edits with the model while it is trained: a callable of picture, prompt and mask."""
        pipe = self.pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        return LocalEditor(pipe)

    @classmethod
    def evaluation_methods(cls, base: str, model: str) -> list[str]:
        """What `iedit evaluate` calls the base's edits and the model's."""
        return [f"editor:{base}", f"editor:{model}"]


class _DiffusionUNet(Family):
    """A UNet that predicts noise, or v."""

    model_name = "unet"
    # "alternate" is the paper's (Sec. 4.1).
    train_blocks = {
        "alternate": ("input", "middle"),
        "input": ("input",),
        "middle": ("middle",),
        "all": ("all",),
        "attention": ("attention",),
    }
    lora_layers = r"(to_q|to_k|to_v|to_out\.0)"

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        self.scheduler = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.prediction_type = self.scheduler.config.prediction_type
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        for name in StableDiffusion3.DENSITY:
            if getattr(args, name) is not None:
                raise ValueError(f"`{name}` is for flow-matching models, and {args.model} is a {self.kind}.")

    def part(self, name: str) -> str:
        return {
            "input": r"(conv_in|down_blocks)\.",
            "middle": r"mid_block\.",
            "all": r"",
            "attention": r".*\.attn[12]\.",
        }[name]

    def draw_timestep(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.num_train_timesteps, (), generator=generator)

    def noise_level(self, timesteps: torch.Tensor) -> torch.Tensor:
        return self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]

    def noise_weight(self, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor | None:
        if snr_gamma is None:
            return None
        snr = compute_snr(self.scheduler, timesteps)
        return snr.clamp(max=snr_gamma) / (snr + 1 if self.prediction_type == "v_prediction" else snr)

    def lora_state(self) -> dict[str, Any]:
        from peft import get_peft_model_state_dict

        return {"unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(self.model))}


class StableDiffusion(_DiffusionUNet):
    """Stable Diffusion 1.x and 2.x."""

    kind = "Stable Diffusion 1.x or 2.x"
    pipeline_class = IEditPipeline
    # The paper's.
    resolution = 384

    @staticmethod
    def fits(index: dict) -> bool:
        return "unet" in index and not {"text_encoder_2", "controlnet"} & index.keys()

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        tokens = self.pipe.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"states": self.pipe.text_encoder(tokens.to(self.pipe.text_encoder.device))[0]}

    def predict(self, model, noisy_latents, timesteps, **prompt):
        return model(noisy_latents, timesteps, prompt["states"], return_dict=False)[0]

    def editor(self, device: torch.device) -> Any:
        names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        components = {name: getattr(self.pipe, name) for name in names}
        pipe = IEditPipeline(**components, requires_safety_checker=False).to(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @classmethod
    def evaluation_methods(cls, base: str, model: str) -> list[str]:
        return ["sdedit", "iedit", "iedit-m"]


def _in_fp32(function: Callable) -> Callable:
    """A function of one tensor, as a model's `decode`, outside of autocast."""

    def call(tensor: torch.Tensor, *args, **kwargs):
        with torch.autocast(tensor.device.type, enabled=False):
            return function(tensor.float(), *args, **kwargs)

    return call


class StableDiffusionXL(_DiffusionUNet):
    """Stable Diffusion XL: two text encoders, and a UNet that is told of the picture's size.

    Its VAE, which overflows in fp16, stays in fp32 wherever it is used.

    Raises:
        ValueError: If it lacks a part, if its latents are not those of the UNet's input, as in models for inpainting,
            or if they are normalised by means of their own, as Playground's, which also has its own schedule.
    """

    kind = "Stable Diffusion XL with both text encoders"
    pipeline_class = StableDiffusionXLImg2ImgPipeline
    resolution = 1024
    # Of a model this large, as for Stable Diffusion 3.
    lora_rank = 16

    def __init__(self, pipe: DiffusionPipeline):
        for name in ("vae", "tokenizer", "tokenizer_2"):
            if getattr(pipe, name) is None:
                raise ValueError(f"`model` has no {name}, and cannot be trained without.")
        super().__init__(pipe)
        if self.model.config.addition_embed_type != "text_time":
            raise ValueError(
                "`model`: its UNet has to be told of the picture's size (`addition_embed_type` text_time), as Stable"
                f" Diffusion XL's is, and is told of {self.model.config.addition_embed_type}."
            )
        takes, has = self.model.config.in_channels, self.pipe.vae.config.latent_channels
        if takes != has:
            raise ValueError(
                f"`model`: its UNet takes {takes} channels, where its VAE has {has}: it is made for inpainting or"
                " another task."
            )
        if self.pipe.vae.config.latents_mean is not None:
            raise ValueError("`model`: its latents are normalised by their mean, which is not supported.")
        vae = self.pipe.vae
        # Or else the pipeline would cast it to the precision of the prompts.
        vae.register_to_config(force_upcast=False)
        vae.encode, vae.decode = _in_fp32(vae.encode), _in_fp32(vae.decode)

    @staticmethod
    def fits(index: dict) -> bool:
        # The refiner lacks the first of them.
        encoders = [index.get(name, [None])[0] for name in ("text_encoder", "text_encoder_2")]
        return "unet" in index and "controlnet" not in index and encoders == 2 * ["transformers"]

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        if self.pipe.config.force_zeros_for_empty_prompt:
            # What guidance starts from in the pipeline.
            given = torch.tensor([bool(prompt) for prompt in prompts], device=states.device)
            states, pooled = states * given.view(-1, 1, 1), pooled * given.view(-1, 1)
        return {"states": states, "pooled": pooled}

    def predict(self, model, noisy_latents, timesteps, **prompt):
        # Of what was not cropped from anything larger, as the pipeline says of its own pictures.
        size = [self.pipe.vae_scale_factor * edge for edge in noisy_latents.shape[-2:]]
        time_ids = noisy_latents.new_tensor([*size, 0, 0, *size]).repeat(len(noisy_latents), 1)
        conditions = {"text_embeds": prompt["pooled"], "time_ids": time_ids}
        return model(noisy_latents, timesteps, prompt["states"], added_cond_kwargs=conditions, return_dict=False)[0]


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5: a transformer that predicts a flow's velocity.

    z_t, eps_2 and z^_1 have the form that `losses.py` gives for flow matching. Timesteps are drawn as in diffusers'
    own scripts for this family, and t/T, by which Eq. 12 weighs its terms, is sigma.
    """

    kind = "Stable Diffusion 3 or 3.5"
    pipeline_class = StableDiffusion3Img2ImgPipeline
    model_name = "transformer"
    # A transformer has no input blocks that see the picture larger than the middle one does. What takes their place is
    # its first third, with what embeds picture, text and t, and its second third.
    train_blocks = {
        "alternate": ("first", "middle"),
        "first": ("first",),
        "middle": ("middle",),
        "all": ("all",),
        "attention": ("attention",),
    }
    # As diffusers' scripts have it.
    lora_layers = r"(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    resolution = 512
    lora_rank = 16
    prediction_type = "flow_prediction"
    # How timesteps are drawn, in the names of diffusers' scripts and with their values.
    DENSITY = {"weighting_scheme": "logit_normal", "logit_mean": 0.0, "logit_std": 1.0, "mode_scale": 1.29}

    def __init__(self, pipe: DiffusionPipeline):
        super().__init__(pipe)
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        self.num_train_timesteps = self.scheduler.config.num_train_timesteps
        self.density: dict[str, Any] = self.DENSITY

    @staticmethod
    def fits(index: dict) -> bool:
        return index.get("transformer") == ["diffusers", "SD3Transformer2DModel"]

    @property
    def multiple(self) -> int:
        return self.pipe.vae_scale_factor * self.model.config.patch_size

    def settle(self, args: argparse.Namespace) -> None:
        super().settle(args)
        for name, value in self.DENSITY.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        self.density = {name: getattr(args, name) for name in self.DENSITY}

    def part(self, name: str) -> str:
        count = len(self.model.transformer_blocks)
        third = -(-count // 3)
        first, middle = ("|".join(map(str, blocks)) for blocks in (range(third), range(third, min(2 * third, count))))
        return {
            "first": rf"(pos_embed|time_text_embed|context_embedder|transformer_blocks\.({first}))\.",
            # Of a single block there is none.
            "middle": rf"transformer_blocks\.({middle or '-'})\.",
            "all": r"",
            "attention": r".*\.attn2?\.",
        }[name]

    def encode_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        states, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def draw_timestep(self, generator: torch.Generator) -> torch.Tensor:
        share = compute_density_for_timestep_sampling(**self.density, batch_size=1, generator=generator)
        index = (share * self.num_train_timesteps).long().clamp(max=self.num_train_timesteps - 1)
        return self.scheduler.timesteps[index].squeeze(0)

    def noise_level(self, timesteps: torch.Tensor) -> torch.Tensor:
        return timesteps / self.num_train_timesteps

    def noise_weight(self, timesteps: torch.Tensor, snr_gamma: float | None) -> torch.Tensor | None:
        sigma = self.noise_level(timesteps)
        weight = compute_loss_weighting_for_sd3(self.density["weighting_scheme"], sigma)
        if snr_gamma is not None:
            # An error of the velocity is one of the latents divided by sigma.
            weight = weight * sigma**2 * ((1 - sigma) / sigma).square().clamp(max=snr_gamma)
        return weight

    def predict(self, model, noisy_latents, timesteps, **prompt):
        return model(
            hidden_states=noisy_latents,
            timestep=timesteps,
            encoder_hidden_states=prompt["states"],
            pooled_projections=prompt["pooled"],
            return_dict=False,
        )[0]

    def lora_state(self) -> dict[str, Any]:
        from peft import get_peft_model_state_dict

        return {"transformer_lora_layers": get_peft_model_state_dict(self.model)}


FAMILIES: tuple[type[Family], ...] = (StableDiffusion, StableDiffusionXL, StableDiffusion3)


def find_family(model: str) -> type[Family]:
    """The family of a model: a Hub id, of which only `model_index.json` is fetched, a folder, or a shipped one.

    Raises:
        ValueError: If there is no such model, or if it is of no family that can be fine-tuned.
    """
    index = loading.read_index(model, "`model`")
    for family in FAMILIES:
        if family.fits(index):
            return family
    kinds = ", or a ".join(family.kind for family in FAMILIES)
    raise ValueError(
        f"`model` {model!r} is a {index['_class_name']}, which cannot be fine-tuned here: it has to be a {kinds}."
    )


def load_base(model: str) -> Any:
    """The pipeline to fine-tune, in fp32.

    Args:
        model (`str`): A Hub id, a folder, `mini`, `mini-base`, from which `mini` was trained, or `mini-sd3`.

    Raises:
        ValueError: If there is no such model, if it is of no family that can be fine-tuned, or if it is not all there.
    """
    family = find_family(model)
    return loading.load_pipeline(family.pipeline_class, model, "`model`", family.kind, dtype=torch.float32)


def load_family(model: str) -> Family:
    """What `load_base` loads, as its training sees it."""
    return find_family(model)(load_base(model))
