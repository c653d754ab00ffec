"""Networks in the sizes that Stable Diffusion 1.4 is edited and fine-tuned with; their weights are random."""

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_iedit import mini
from diffusers_iedit.losses import VGG16Features


# The configurations of CompVis/stable-diffusion-v1-4, where they are not the classes' defaults.
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TEXT_ENCODER = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# The image half of openai/clip-vit-large-patch14, whose text half is the text encoder.
CLIP_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}

# The defaults of the last two classes are madebyollin/taesd and VGG-16.
NETWORKS = {
    "vae": lambda: AutoencoderKL(**VAE),
    "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
    "unet": lambda: UNet2DConditionModel(**UNET),
    "clip": lambda: CLIPModel(CLIPConfig(text_config=TEXT_ENCODER, vision_config=CLIP_VISION, projection_dim=768)),
    "tiny_vae": AutoencoderTiny,
    "vgg": VGG16Features,
}


def build(network: str, dtype: torch.dtype, device: str) -> nn.Module:
    """One of `NETWORKS`, in evaluation mode."""
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = NETWORKS[network]()
    torch.set_default_dtype(torch.float32)
    return model.eval()


def tokenizer() -> CLIPTokenizer:
    """A tokenizer for `text_encoder` and `clip`: which ids it gives costs nothing, so the mini one's will do."""
    return CLIPTokenizer.from_pretrained(mini.model_path() / "tokenizer", model_max_length=77)
