"""Edit a photo of your own inside a mask of your own; outside the mask every pixel keeps its value.

    python examples/edit_photo.py photo.jpg mask.png "a red sports car on a road" edited.png

The mask has the photo's size and is white where the edit goes. A large photo is edited at the size its model was
trained for (--processing-resolution), and the result is set into the untouched original.
"""

import argparse

import torch
from PIL import Image

from diffusers_iedit import IEditPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("mask", help="white = edit")
    parser.add_argument("prompt", help="what the photo shows after the edit")
    parser.add_argument("output", help="PNG keeps the rest of the photo exact")
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="any Stable Diffusion 1.x or 2.x")
    parser.add_argument("--strength", type=float, default=0.7, help="how far to go from the photo")
    parser.add_argument("--steps", "--num_inference_steps", type=int, default=50)
    parser.add_argument("--processing-resolution", type=int, default=512, help="longer side of the edit in pixels")
    parser.add_argument(
        "--feather", type=int, default=8, help="pixels over which the edit fades in at the mask's edge"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = IEditPipeline.from_pretrained(args.model, dtype=dtype).to(device)
    result = pipe(
        Image.open(args.photo),
        args.prompt,
        mask_image=Image.open(args.mask),
        strength=args.strength,
        num_inference_steps=args.steps,
        processing_resolution=args.processing_resolution,
        mask_feather=args.feather,
        generator=torch.Generator().manual_seed(args.seed),
    )
    result.images[0].save(args.output)


if __name__ == "__main__":
    main()
