"""
One tiny random pipeline a family of models, in the family's own classes: what the tests of masked editing run through.

`FAMILIES["flux"].pipe()` is a new `FluxImg2ImgPipeline`, `FAMILIES["flux"].call` what it is called with beside
`prompt`, `image` and `generator`. The components are built once a process; a pipeline has a scheduler of its own.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from tiny_models import _eval, _seeded, _text_config, _vae, sd3_components, sd_components, sdxl_components, tokenizer
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast


# Not square, so that no height passes for a width. In latents 8 x 12, in tokens of 2 x 2 cells 4 x 6.
HEIGHT, WIDTH = 64, 96


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        pipeline_class: The class of diffusers.
        components: Builds what `pipeline_class` is made of.
        call: What a call takes, beside `prompt`, `image`, `generator` and `output_type`, to be quick and of the size
            `HEIGHT` x `WIDTH`. It has a `strength` if the class has one.
        token_side: Cells on a side of a token, or None if the latents are not packed.
        encode: For pipelines that start from noise: `encode(pipe, pixels)` is the latents of an image (B, 3, H, W) in
            [-1, 1], as the model has them before they are packed: (B, C, h, w).
    """

    pipeline_class: type[DiffusionPipeline]
    components: Callable[[], dict[str, Any]]
    call: dict[str, Any]
    token_side: int | None = None
    encode: Callable[[DiffusionPipeline, torch.Tensor], torch.Tensor] | None = None

    def pipe(self) -> DiffusionPipeline:
        """A pipeline whose models are shared with others of this family, in eval mode, on the CPU."""
        components = _built(self.components)
        pipe = self.pipeline_class(**components | {"scheduler": copy.deepcopy(components["scheduler"])})
        pipe.set_progress_bar_config(disable=True)
        return pipe


@functools.cache
def _built(components):
    return components()


def t5_tokenizer():
    """A `T5TokenizerFast` that knows printable ASCII characters: a character costs one token."""
    characters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in ["▁", *characters])]
    return T5TokenizerFast(vocab=vocab, extra_ids=0)


def t5_encoder():
    """A `T5EncoderModel` for `t5_tokenizer`, with states of width 32."""
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False)
    )


def flow_vae(**overrides):
    """An `AutoencoderKL` as the flow-matching models have it, with a shift; four latent channels, factor 8."""
    return _vae(
        8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611, **overrides
    )


def _flux_transformer(**overrides):
    config = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    return FluxTransformer2DModel(**config | overrides)


def flux_components():
    with _seeded(0):
        return _eval(
            {
                "vae": flow_vae(),
                "text_encoder": CLIPTextModel(_text_config()),
                "text_encoder_2": t5_encoder(),
                "tokenizer": tokenizer(),
                "tokenizer_2": t5_tokenizer(),
                "transformer": _flux_transformer(),
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            }
        )


@torch.no_grad()
def encode_shifted(pipe, pixels):
    """The mode of the VAE's distribution, shifted and scaled, as Flux Kontext encodes its images."""
    latents = pipe.vae.encode(pixels).latent_dist.mode()
    return (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor


IMG2IMG = {"num_inference_steps": 4, "strength": 0.75}
SIZE = {"height": HEIGHT, "width": WIDTH}

FAMILIES = {
    "sd": Family(StableDiffusionImg2ImgPipeline, sd_components, IMG2IMG),
    "sdxl": Family(StableDiffusionXLImg2ImgPipeline, sdxl_components, IMG2IMG),
    "sd3": Family(StableDiffusion3Img2ImgPipeline, sd3_components, IMG2IMG | SIZE),
    "flux": Family(FluxImg2ImgPipeline, flux_components, IMG2IMG | SIZE, token_side=2),
    "flux-kontext": Family(
        FluxKontextPipeline,
        flux_components,
        {"num_inference_steps": 3, "max_area": HEIGHT * WIDTH, "_auto_resize": False} | SIZE,
        token_side=2,
        encode=encode_shifted,
    ),
}
