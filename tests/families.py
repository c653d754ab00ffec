"""
One tiny random pipeline a family of models, in the family's own classes: what the tests of masked editing run through.

`FAMILIES["flux"].pipe()` is a new `FluxImg2ImgPipeline`, `FAMILIES["flux"].call` what it is called with beside
`prompt`, `image` and `generator`. The models are built once a process; each pipeline has a scheduler of its own.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaImg2ImgPipeline,
    ChromaTransformer2DModel,
    ControlNetModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxControlImg2ImgPipeline,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetModel,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageTransformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    ZImageImg2ImgPipeline,
    ZImageTransformer2DModel,
)

# Not from `diffusers`, where its place is taken as long as sentencepiece is not installed.
from diffusers.pipelines.kolors.pipeline_kolors_img2img import KolorsImg2ImgPipeline
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from tiny_models import (
    _eval,
    _seeded,
    _text_config,
    _vae,
    byte_characters,
    sd3_components,
    sd_components,
    sdxl_components,
    tokenizer,
)
from transformers import (
    CLIPTextModel,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


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
            [-1, 1], as the model has them before they are packed: (B, C, h, w) or (B, C, 1, h, w).
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
    with _seeded(0):
        return _eval(components())


@pytest.fixture
def small_conditions(monkeypatch):
    """Of Qwen-Image-Edit, which shows its model the image at 1024 x 1024 pixels, whatever the size of the edit."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        dimensions = functools.partial(module.calculate_dimensions, HEIGHT * WIDTH)
        monkeypatch.setattr(module, "calculate_dimensions", lambda _, ratio, dimensions=dimensions: dimensions(ratio))


# Text


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
)
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PIXTRAL_TOKENS = ["[IMG]"]
END = "<|endoftext|>"


def byte_tokenizer():
    """A `Qwen2Tokenizer` that knows bytes, no merges, and the special tokens of all chats."""
    special = [*CHAT_TOKENS, *VISION_TOKENS, *PIXTRAL_TOKENS]
    vocab = {token: i for i, token in enumerate([*byte_characters(), END, *special])}
    return Qwen2Tokenizer(vocab=vocab, merges=[], extra_special_tokens=special, chat_template=CHAT_TEMPLATE)


def _language_config(num_hidden_layers=2):
    return {
        "vocab_size": len(byte_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        **{name: byte_tokenizer().convert_tokens_to_ids(END) for name in ("bos_token_id", "eos_token_id")},
    }


class QwenProcessor(Qwen2VLProcessor):
    """`Qwen2VLProcessor` without its processor of videos, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer)


class GLMTokenizer(T5TokenizerFast):
    """In the place of Kolors' own, which reads a file of sentencepiece, a library the tests do without."""

    def __call__(self, *args, **kwargs):
        encoding = super().__call__(*args, **kwargs)
        encoding["position_ids"] = torch.arange(encoding.input_ids.shape[1]).expand_as(encoding.input_ids)
        return encoding


def t5_tokenizer(tokenizer_class=T5TokenizerFast):
    """A `T5TokenizerFast` that knows printable ASCII characters: a character costs one token."""
    characters = ["▁", *(chr(code) for code in range(ord("!"), ord("~") + 1))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((character, -2.0) for character in characters)]
    return tokenizer_class(vocab=vocab, extra_ids=0)


def t5_encoder():
    """A `T5EncoderModel` for `t5_tokenizer`, with states of width 32."""
    return T5EncoderModel(
        T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, is_encoder_decoder=False)
    )


def qwen2_5_vl():
    """A `Qwen2_5_VLForConditionalGeneration` for `byte_tokenizer`, with states of width 32."""
    names = {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    names |= {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    config = Qwen2_5_VLConfig(
        text_config=_language_config()
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_heads": 4,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **{name: byte_tokenizer().convert_tokens_to_ids(token) for name, token in names.items()},
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def mistral3():
    """A `Mistral3ForConditionalGeneration` for `byte_tokenizer`, with states of width 32."""
    config = Mistral3Config(
        text_config=_language_config() | {"model_type": "mistral"},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "head_dim": 8,
            "image_size": 28,
            "patch_size": 14,
        },
        image_token_id=byte_tokenizer().convert_tokens_to_ids("[IMG]"),
    )
    return Mistral3ForConditionalGeneration(config)


def chat_glm():
    """A `ChatGLMModel` for `t5_tokenizer`, with states of width 32."""
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=128,
        hidden_size=32,
        ffn_hidden_size=37,
        kv_channels=8,
        num_attention_heads=4,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        original_rope=True,
    )
    model = ChatGLMModel(config, empty_init=False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


# Components


def flow_vae():
    """An `AutoencoderKL` as the flow-matching models have it, with a shift; four latent channels, factor 8."""
    return _vae(8, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1159, scaling_factor=0.3611)


def flow_scheduler(**overrides):
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, "use_dynamic_shifting": True} | overrides)


FLUX = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}


def flux_components(**transformer):
    transformer = FLUX | {"pooled_projection_dim": 32, "guidance_embeds": True} | transformer
    return {
        "vae": flow_vae(),
        "text_encoder": CLIPTextModel(_text_config()),
        "text_encoder_2": t5_encoder(),
        "tokenizer": tokenizer(),
        "tokenizer_2": t5_tokenizer(),
        "transformer": FluxTransformer2DModel(**transformer),
        "scheduler": flow_scheduler(),
    }


def flux_control_components():
    """The control's latents stand beside the others in the channels of the input."""
    return flux_components(in_channels=32, out_channels=16)


def flux_controlnet_components():
    controlnet = FluxControlNetModel(**FLUX, pooled_projection_dim=32, guidance_embeds=True)
    return flux_components() | {"controlnet": controlnet}


def chroma_components():
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 1}
    return {
        "vae": flow_vae(),
        "text_encoder": t5_encoder(),
        "tokenizer": t5_tokenizer(),
        "transformer": ChromaTransformer2DModel(**FLUX, **approximator),
        "scheduler": flow_scheduler(),
    }


def z_image_components():
    return {
        "vae": flow_vae(),
        "text_encoder": Qwen3Model(Qwen3Config(**_language_config())),
        "tokenizer": byte_tokenizer(),
        "transformer": ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 4, 8],
            axes_lens=[1024, 32, 32],
        ),
        "scheduler": flow_scheduler(use_dynamic_shifting=False),
    }


def qwen_image_components():
    return {
        "vae": AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2, 2, 2],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, -0.4],
            latents_std=[1.5, 0.8, 2.0, 1.2],
        ),
        "text_encoder": qwen2_5_vl(),
        "tokenizer": byte_tokenizer(),
        "transformer": QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": flow_scheduler(shift_terminal=0.02),
    }


def qwen_image_edit_components():
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return qwen_image_components() | {"processor": QwenProcessor(image_processor, byte_tokenizer())}


def _flux2_components():
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * 32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return {"vae": vae, "transformer": transformer, "scheduler": flow_scheduler()}


def flux2_components():
    # A tokenizer in the place of the `PixtralProcessor`, which needs torchvision.
    return _flux2_components() | {"text_encoder": mistral3(), "tokenizer": byte_tokenizer()}


def flux2_klein_components():
    text_encoder = Qwen3ForCausalLM(Qwen3Config(**_language_config()))
    return _flux2_components() | {"text_encoder": text_encoder, "tokenizer": byte_tokenizer()}


def kolors_components():
    components = sdxl_components()
    for name in ("text_encoder_2", "tokenizer_2"):
        del components[name]
    unet = UNet2DConditionModel.from_config(
        components["unet"].config,
        cross_attention_dim=32,
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return components | {"text_encoder": chat_glm(), "tokenizer": t5_tokenizer(GLMTokenizer), "unet": unet}


def lcm_components():
    components = sd_components(time_cond_proj_dim=16)
    return components | {"scheduler": LCMScheduler.from_config(components["scheduler"].config)}


def _controlnet(unet):
    return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16, 16, 16))


def sd_controlnet_components():
    components = sd_components()
    return components | {"controlnet": _controlnet(components["unet"])}


def sdxl_controlnet_components():
    components = sdxl_components()
    return components | {"controlnet": _controlnet(components["unet"])}


def instruct_pix2pix_components():
    components = sd_components(in_channels=8)
    return components | {"scheduler": EulerDiscreteScheduler.from_config(components["scheduler"].config)}


# Source latents, as the pipelines encode the image that they edit


@torch.no_grad()
def encode(pipe, pixels):
    """Flux Kontext, Flux.2 and Flux.2 Klein."""
    return pipe._encode_vae_image(image=pixels, generator=None)


@torch.no_grad()
def encode_frame(pipe, pixels):
    """Qwen-Image-Edit, whose VAE knows frames."""
    return pipe._encode_vae_image(image=pixels[:, :, None], generator=None)


@torch.no_grad()
def encode_scaled(pipe, pixels):
    """InstructPix2Pix: latents as the UNet denoises them, while those it is shown beside are not scaled."""
    return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


SIZE = {"height": HEIGHT, "width": WIDTH}
IMG2IMG = {"num_inference_steps": 4, "strength": 0.75}
CONTROL = {"control_image": Image.linear_gradient("L").convert("RGB").resize((WIDTH, HEIGHT))}
KONTEXT = {"num_inference_steps": 3, "max_area": HEIGHT * WIDTH, "_auto_resize": False} | SIZE
# The text encoders of the real ones have more than thirty layers, of which some in the middle are taken.
FLUX2 = {"num_inference_steps": 3, "text_encoder_out_layers": (1, 2)} | SIZE
QWEN_EDIT = {"num_inference_steps": 3} | SIZE

FAMILIES = {
    "sd": Family(StableDiffusionImg2ImgPipeline, sd_components, IMG2IMG),
    "sd-controlnet": Family(StableDiffusionControlNetImg2ImgPipeline, sd_controlnet_components, IMG2IMG | CONTROL),
    "lcm": Family(LatentConsistencyModelImg2ImgPipeline, lcm_components, IMG2IMG),
    "sdxl": Family(StableDiffusionXLImg2ImgPipeline, sdxl_components, IMG2IMG),
    "sdxl-controlnet": Family(
        StableDiffusionXLControlNetImg2ImgPipeline, sdxl_controlnet_components, IMG2IMG | CONTROL
    ),
    "kolors": Family(KolorsImg2ImgPipeline, kolors_components, IMG2IMG | SIZE),
    "sd3": Family(StableDiffusion3Img2ImgPipeline, sd3_components, IMG2IMG | SIZE),
    "flux": Family(FluxImg2ImgPipeline, flux_components, IMG2IMG | SIZE, token_side=2),
    "flux-control": Family(
        FluxControlImg2ImgPipeline, flux_control_components, IMG2IMG | SIZE | CONTROL, token_side=2
    ),
    "flux-controlnet": Family(
        FluxControlNetImg2ImgPipeline, flux_controlnet_components, IMG2IMG | SIZE | CONTROL, token_side=2
    ),
    "chroma": Family(ChromaImg2ImgPipeline, chroma_components, IMG2IMG | SIZE, token_side=2),
    "z-image": Family(ZImageImg2ImgPipeline, z_image_components, IMG2IMG | SIZE),
    "qwen-image": Family(QwenImageImg2ImgPipeline, qwen_image_components, IMG2IMG | SIZE, token_side=2),
    "instruct-pix2pix": Family(
        StableDiffusionInstructPix2PixPipeline,
        instruct_pix2pix_components,
        {"num_inference_steps": 4},
        encode=encode_scaled,
    ),
    "flux-kontext": Family(FluxKontextPipeline, flux_components, KONTEXT, token_side=2, encode=encode),
    "flux2": Family(Flux2Pipeline, flux2_components, FLUX2, token_side=1, encode=encode),
    "flux2-klein": Family(Flux2KleinPipeline, flux2_klein_components, FLUX2, token_side=1, encode=encode),
    "qwen-image-edit": Family(
        QwenImageEditPipeline, qwen_image_edit_components, QWEN_EDIT, token_side=2, encode=encode_frame
    ),
    "qwen-image-edit-plus": Family(
        QwenImageEditPlusPipeline, qwen_image_edit_components, QWEN_EDIT, token_side=2, encode=encode_frame
    ),
}
