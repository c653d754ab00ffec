"""Several edits of one photo, one after the other: each has a mask and a prompt, and starts from the one before.

    python examples/edit_several.py photo.jpg edited.png --edit car.png "a red car" --edit tree.png "a tall palm tree"

What lies in no mask keeps its value to the byte. Where masks overlap, the later edit changes what the earlier one
made. Any image-to-image model does: SDXL, SD 3.5, Flux, Qwen-Image, Z-Image ...
"""

import argparse

import torch
from PIL import Image

from diffusers_iedit import LocalEditor


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo")
    parser.add_argument("output", help="PNG keeps the rest of the photo exact")
    parser.add_argument("--edit", nargs=2, action="append", required=True, metavar=("MASK", "PROMPT"))
    parser.add_argument("--model", default="stabilityai/stable-diffusion-xl-base-1.0")
    parser.add_argument("--padding", type=int, default=64, help="pixels of context around a mask")
    parser.add_argument("--strength", type=float, default=0.7, help="how far to go from the photo")
    parser.add_argument("--steps", "--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the first edit; the next ones count on")
    args = parser.parse_args()

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    editor = LocalEditor.from_pretrained(args.model, dtype=dtype).to(device)
    edits = [
        {
            "prompt": prompt,
            "mask_image": Image.open(mask),
            "padding_mask_crop": args.padding,
            "strength": args.strength,
            "num_inference_steps": args.steps,
            "seed": args.seed + number,
        }
        for number, (mask, prompt) in enumerate(args.edit)
    ]
    editor.apply(Image.open(args.photo), edits).images[0].save(args.output)


if __name__ == "__main__":
    main()
