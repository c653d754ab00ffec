"""Edit a photo with Stable Diffusion XL, where a mask of your own says or where a word is found in the photo.

    python examples/edit_sdxl.py photo.jpg "a red sports car on a road" edited.png --mask mask.png
    python examples/edit_sdxl.py photo.jpg "a red sports car on a road" edited.png --mask-prompt car

The mask's surroundings are cut out, edited at the model's size and set back; outside the mask every pixel keeps its
value.
"""

import argparse

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from diffusers_iedit import LocalEditor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("prompt", help="what the photo shows after the edit")
    parser.add_argument("output", help="PNG keeps the rest of the photo exact")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", help="white = edit")
    where.add_argument("--mask-prompt", help="what to look for in the photo")
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--mask-model", default="CIDAS/clipseg-rd64-refined", help="for --mask-prompt")
    parser.add_argument("--mask-threshold", type=float, default=0.5, help="probability from which it is found")
    parser.add_argument("--padding", type=int, default=64, help="pixels of context around the mask")
    parser.add_argument("--strength", type=float, default=0.7, help="how far to go from the photo")
    parser.add_argument("--steps", "--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    editor = LocalEditor(StableDiffusionXLImg2ImgPipeline.from_pretrained(args.model, dtype=dtype))
    if args.mask_prompt:
        editor.mask_model = CLIPSegForImageSegmentation.from_pretrained(args.mask_model, dtype=dtype)
        editor.mask_processor = CLIPSegProcessor.from_pretrained(args.mask_model)
    editor.to(device)
    result = editor(
        Image.open(args.photo),
        args.prompt,
        mask_image=Image.open(args.mask) if args.mask else None,
        mask_prompt=args.mask_prompt,
        mask_threshold=args.mask_threshold,
        padding_mask_crop=args.padding,
        strength=args.strength,
        num_inference_steps=args.steps,
        generator=torch.Generator().manual_seed(args.seed),
    )
    result.images[0].save(args.output)


if __name__ == "__main__":
    main()
