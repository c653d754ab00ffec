"""Recolour the thing in a picture of the mini world; nothing is downloaded, and it takes seconds on a CPU.

    python examples/edit_mini.py --seed 0 --colour blue --output-dir outputs
    python examples/edit_mini.py --seed 3 --thing cat --grid 6 --output-dir outputs

writes `source.png`, `mask.png` (where CLIPSeg found the words that the two captions differ in) and `edit.png`. With
`--grid`, the thing is a small one in a large picture of many scenes: it is found by its name, and only its
surroundings are edited.
"""

import argparse
from pathlib import Path

import torch

from diffusers_iedit import IEditPipeline, mini


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="which picture to draw, and the noise of the edit")
    parser.add_argument("--thing", choices=mini.NOUNS, help="what to turn the thing into (default: what it is)")
    parser.add_argument("--colour", choices=mini.COLOURS, help="its new colour (default: the one it has)")
    parser.add_argument("--grid", type=int, default=1, help="scenes a side of a large picture (default: one scene)")
    parser.add_argument("--strength", type=float, default=0.7, help="how far to go from the source")
    parser.add_argument("--mask-dilation", type=int, default=2, help="pixels by which to grow the mask that is found")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args()

    large = args.grid > 1
    scene = mini.render_large(args.seed, args.grid) if large else mini.render(args.seed)
    prompt = scene.swap(args.thing, args.colour).caption
    if prompt == scene.caption:
        parser.error(f"the picture shows {scene.caption!r} already; choose another --thing or --colour")

    pipe = IEditPipeline.from_pretrained(mini.model_path())
    result = pipe(
        scene.image,
        prompt,
        **({"mask_prompt": scene.thing.name, "padding_mask_crop": 16} if large else {"source_prompt": scene.caption}),
        strength=args.strength,
        mask_dilation=args.mask_dilation,
        generator=torch.Generator().manual_seed(args.seed),
    )

    args.output_dir.mkdir(parents=True, exist_ok=True)
    scene.image.save(args.output_dir / "source.png")
    result.masks[0].save(args.output_dir / "mask.png")
    result.images[0].save(args.output_dir / "edit.png")
    print(f"{scene.caption} -> {prompt}: see {args.output_dir}")


if __name__ == "__main__":
    main()
