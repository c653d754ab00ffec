"""Tiny random models in the real classes: what the tests build their pipelines from. Seeded, nothing is downloaded."""

from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTImageProcessorPil,
)


BOS, EOS = "<|startoftext|>", "<|endoftext|>"
VOCAB_SIZE = 2 * 256 + 2
BLIP_WORDS = ["a", "the", "on", "in", "and", "red", "blue", "green", "car", "ball", "house", "tree", "sky", "grass"]


@contextmanager
def _seeded(seed):
    """Random initialisation from `seed` that leaves the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _eval(components):
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components


def byte_characters():
    """The characters that stand for the 256 bytes in the vocabularies of GPT-2, CLIP and Qwen, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def tokenizer(model_max_length=77):
    """A `CLIPTokenizer` that knows bytes and no merges: a word costs one token a byte; ids as in CLIP, EOS highest."""
    characters = byte_characters()
    vocab = {c: i for i, c in enumerate([*characters, *(c + "</w>" for c in characters), BOS, EOS])}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=EOS, model_max_length=model_max_length)


def _text_config(hidden_size=32, hidden_act="quick_gelu", **overrides):
    return CLIPTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=hidden_act,
        projection_dim=32,
        bos_token_id=VOCAB_SIZE - 2,
        eos_token_id=VOCAB_SIZE - 1,
        pad_token_id=VOCAB_SIZE - 1,
        **overrides,
    )


def _vision_config(image_size=32, num_hidden_layers=2):
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=8,
        projection_dim=32,
    )


def _vae(vae_scale_factor, latent_channels=4, **overrides):
    blocks = vae_scale_factor.bit_length()
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(8,) * (blocks - 1) + (16,),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        sample_size=8 * vae_scale_factor,
        **overrides,
    )


def sd_components(seed=0, vae_scale_factor=8, **unet_overrides):
    """Components of `StableDiffusionImg2ImgPipeline`, scheduler set up as in SD 1.4. `vae_scale_factor`: 4 or 8."""
    unet_config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        "cross_attention_dim": 32,
    }
    with _seeded(seed):
        return _eval(
            {
                "vae": _vae(vae_scale_factor),
                "text_encoder": CLIPTextModel(_text_config()),
                "tokenizer": tokenizer(),
                "unet": UNet2DConditionModel(**(unet_config | unet_overrides)),
                "scheduler": DDIMScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    clip_sample=False,
                    set_alpha_to_one=False,
                    steps_offset=1,
                ),
                "safety_checker": None,
                "feature_extractor": None,
                "requires_safety_checker": False,
            }
        )


def sdxl_components(seed=0, vae_scale_factor=8):
    """Components of `StableDiffusionXLImg2ImgPipeline`, scheduler set up as in SDXL 1.0."""
    with _seeded(seed):
        return _eval(
            {
                "vae": _vae(vae_scale_factor),
                "text_encoder": CLIPTextModel(_text_config()),
                "text_encoder_2": CLIPTextModelWithProjection(_text_config(hidden_act="gelu")),
                "tokenizer": tokenizer(),
                "tokenizer_2": tokenizer(),
                "unet": UNet2DConditionModel(
                    sample_size=8,
                    in_channels=4,
                    out_channels=4,
                    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                    block_out_channels=(16, 32),
                    layers_per_block=1,
                    attention_head_dim=(2, 4),
                    norm_num_groups=4,
                    use_linear_projection=True,
                    cross_attention_dim=64,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=6 * 8 + 32,
                ),
                "scheduler": EulerDiscreteScheduler(
                    beta_start=0.00085,
                    beta_end=0.012,
                    beta_schedule="scaled_linear",
                    timestep_spacing="leading",
                    steps_offset=1,
                ),
                "image_encoder": None,
                "feature_extractor": None,
            }
        )


def sd3_components(seed=0, vae_scale_factor=8, num_layers=1):
    """Components of `StableDiffusion3Img2ImgPipeline`, without the T5 encoder (`text_encoder_3` is None)."""
    with _seeded(seed):
        return _eval(
            {
                "vae": _vae(
                    vae_scale_factor,
                    use_quant_conv=False,
                    use_post_quant_conv=False,
                    shift_factor=0.0609,
                    scaling_factor=1.5035,
                ),
                "text_encoder": CLIPTextModelWithProjection(_text_config()),
                "text_encoder_2": CLIPTextModelWithProjection(_text_config(hidden_act="gelu")),
                "text_encoder_3": None,
                "tokenizer": tokenizer(),
                "tokenizer_2": tokenizer(),
                "tokenizer_3": None,
                "transformer": SD3Transformer2DModel(
                    sample_size=8,
                    patch_size=1,
                    in_channels=4,
                    out_channels=4,
                    num_layers=num_layers,
                    attention_head_dim=8,
                    num_attention_heads=4,
                    joint_attention_dim=64,
                    caption_projection_dim=32,
                    pooled_projection_dim=64,
                    pos_embed_max_size=32,
                ),
                "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
                "image_encoder": None,
                "feature_extractor": None,
            }
        )


def clipseg(seed=0, image_size=32):
    """`(CLIPSegForImageSegmentation, CLIPSegProcessor)`; logits of `image_size` x `image_size`."""
    config = CLIPSegConfig(
        text_config=_text_config().to_dict(),
        vision_config=_vision_config(image_size, num_hidden_layers=3).to_dict(),
        projection_dim=32,
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )
    image_processor = ViTImageProcessorPil(
        size={"height": image_size, "width": image_size},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    with _seeded(seed):
        model = CLIPSegForImageSegmentation(config).eval()
    return model, CLIPSegProcessor(image_processor=image_processor, tokenizer=tokenizer())


def blip(seed=0, image_size=32):
    """`(BlipForConditionalGeneration, BlipProcessor)` that captions with the few words of `BLIP_WORDS`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    vocab = {word: i for i, word in enumerate([*special, *BLIP_WORDS])}
    config = BlipConfig(
        text_config={
            "vocab_size": len(vocab),
            "hidden_size": 32,
            "encoder_hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": vocab["[PAD]"],
            "bos_token_id": vocab["[DEC]"],
            "eos_token_id": vocab["[SEP]"],
            "sep_token_id": vocab["[SEP]"],
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": image_size,
            "patch_size": 8,
        },
        projection_dim=32,
        image_text_hidden_size=32,
    )
    processor = BlipProcessor(
        image_processor=BlipImageProcessorPil(size={"height": image_size, "width": image_size}),
        tokenizer=BertTokenizer(vocab=vocab, bos_token="[DEC]", model_max_length=64),
    )
    with _seeded(seed):
        model = BlipForConditionalGeneration(config).eval()
    return model, processor


def image_encoder(seed=0, image_size=32):
    """`(CLIPVisionModelWithProjection, CLIPImageProcessor)` as an IP-Adapter needs them; embeddings of width 32."""
    with _seeded(seed):
        model = CLIPVisionModelWithProjection(_vision_config(image_size)).eval()
    size = {"shortest_edge": image_size}
    crop_size = {"height": image_size, "width": image_size}
    return model, CLIPImageProcessorPil(size=size, crop_size=crop_size)


def safety_checker(seed=0, image_size=32, flags_everything=False):
    """`(StableDiffusionSafetyChecker, CLIPImageProcessor)` that flags no image, or all of them."""
    config = CLIPConfig(
        text_config=_text_config().to_dict(), vision_config=_vision_config(image_size).to_dict(), projection_dim=32
    )
    with _seeded(seed):
        checker = StableDiffusionSafetyChecker(config).eval()
    # An image is flagged where its cosine with a concept exceeds that concept's threshold.
    checker.concept_embeds_weights.data.fill_(-1.0 if flags_everything else 1.0)
    checker.special_care_embeds_weights.data.fill_(1.0)
    return checker, image_encoder(seed, image_size)[1]
