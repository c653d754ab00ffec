"""Run iEdit's code over any Stable Diffusion weights in plain diffusers: `custom_pipeline=` in place of an import.

    python examples/custom_pipeline.py photo.jpg mask.png "a red sports car on a road" edited.png

`--custom-pipeline` takes this repository's `src/diffusers_iedit`, or a folder or Hub id that
`IEditPipeline.save_pretrained` wrote. The code there is executed, so look at it before you trust it, and of a Hub id
name the commit that you looked at: `--custom-revision 0123abc...`.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image


PACKAGE = Path(__file__).parents[1] / "src" / "diffusers_iedit"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("mask", help="white = edit")
    parser.add_argument("prompt", help="what the photo shows after the edit")
    parser.add_argument("output")
    parser.add_argument("--model", default="CompVis/stable-diffusion-v1-4", help="the weights")
    parser.add_argument("--custom-pipeline", default=str(PACKAGE), help="the code")
    parser.add_argument("--custom-revision", help="the commit of the code, if it comes from the Hub")
    parser.add_argument("--strength", type=float, default=0.7, help="how far to go from the photo")
    parser.add_argument("--steps", "--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = DiffusionPipeline.from_pretrained(
        args.model,
        custom_pipeline=args.custom_pipeline,
        custom_revision=args.custom_revision,
        trust_remote_code=True,
        dtype=dtype,
    ).to(device)
    result = pipe(
        Image.open(args.photo),
        args.prompt,
        mask_image=Image.open(args.mask),
        strength=args.strength,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    result.images[0].save(args.output)


if __name__ == "__main__":
    main()
