"""Tell Flux Kontext what to do inside a mask of your own; outside the mask every pixel keeps its value.

    python examples/edit_kontext.py photo.jpg mask.png "make the car red" edited.png

The model needs a licence that is accepted on its page, and `hf auth login`. It starts from noise and sees the photo
beside it: there is no strength. Flux.2 and Qwen-Image-Edit do the same, each through its own pipeline.
"""

import argparse

import torch
from diffusers import FluxKontextPipeline
from PIL import Image

from diffusers_iedit import LocalEditor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("mask", help="white = edit")
    parser.add_argument("instruction", help="what is to be done")
    parser.add_argument("output", help="PNG keeps the rest of the photo exact")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-Kontext-dev")
    parser.add_argument("--padding", type=int, default=128, help="pixels of context around the mask")
    parser.add_argument("--resolution", type=int, help="longer side of the edit in pixels (default: the model's)")
    parser.add_argument("--guidance-scale", type=float, default=2.5)
    parser.add_argument("--steps", "--num_inference_steps", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    pipe = FluxKontextPipeline.from_pretrained(args.model, dtype=torch.bfloat16)
    if torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    result = LocalEditor(pipe)(
        Image.open(args.photo),
        args.instruction,
        mask_image=Image.open(args.mask),
        padding_mask_crop=args.padding,
        processing_resolution=args.resolution,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    result.images[0].save(args.output)


if __name__ == "__main__":
    main()
