"""Make the stock SDXL image-to-image pipeline of diffusers a local editor, by its scheduler alone (Eq. 13).

    python examples/local_sdxl.py photo.jpg mask.png "a red sports car on a road" edited.png

The same line works with every image-to-image pipeline whose scheduler can be wrapped. Outside the mask the latents are
the photo's own; the pixels are those that the VAE makes of them, as the stock pipeline does no compositing.
"""

import argparse

import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image, ImageOps

from diffusers_iedit import IEditMaskedScheduler


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("mask", help="white = edit")
    parser.add_argument("prompt", help="what the photo shows after the edit")
    parser.add_argument("output")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--size", type=int, default=1024, help="longer side of the result in pixels")
    parser.add_argument("--strength", type=float, default=0.7, help="how far to go from the photo")
    parser.add_argument("--steps", "--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    photo = ImageOps.exif_transpose(Image.open(args.photo)).convert("RGB")
    # SDXL takes sides that are multiples of 8.
    width, height = (max(round(side * args.size / max(photo.size) / 8), 1) * 8 for side in photo.size)
    photo = photo.resize((width, height), Image.Resampling.LANCZOS)
    mask = ImageOps.exif_transpose(Image.open(args.mask)).convert("L").resize((width, height))
    mask = torch.from_numpy(np.asarray(mask) / 255).float()[None, None]

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, mask)
    result = pipe(
        args.prompt,
        image=photo,
        strength=args.strength,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    result.images[0].save(args.output)


if __name__ == "__main__":
    main()
