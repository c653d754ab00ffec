"""Measures how well words find one small thing in a large picture of the mini world, each number beside its bar.

The pictures are `mini.render_large`'s: grid x grid scenes, one of which holds the thing asked for. `--shift` cuts them
so that scenes and the tiles of the search do not line up, and their sizes are odd.
"""

import argparse
import time

import numpy as np
import torch
from measure import Result
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from diffusers_iedit import mini
from diffusers_iedit.masking_iedit import search


FIRST_SEED = 10_000
"""Of the large pictures, times the grid, so that no two grids have theirs from the same seeds."""


def picture(seed: int, grid: int, shift: bool):
    """A large picture, the thing's mask, and the large scene; where `shift`, without its outer 3 to 29 pixels."""
    rng = np.random.default_rng(seed)
    while True:
        large = mini.render_large(seed, grid)
        left, top, right, bottom = rng.integers(3, 30, 4) * shift
        box = (left, top, large.image.width - right, large.image.height - bottom)
        mask = large.mask.crop(box)
        if mask.histogram()[255] == large.mask.histogram()[255]:
            return large.image.crop(box), np.asarray(mask) > 0, large
        seed += 100_000  # the thing was cut


def absent_names(large: mini.LargeScene, seed: int) -> tuple[str, str]:
    """Two things that are not in the picture: the asked one in another colour, and one whose kind and colour are.

    These are harder than things of which neither is there.
    """
    things = [thing for scene in large.scenes for thing in scene.things]
    names = {thing.name for thing in things}
    nouns, colours = ([*dict.fromkeys(part)] for part in zip(*((t.noun, t.colour) for t in things), strict=True))
    rng = np.random.default_rng(seed)
    other = [f"{colour} {large.thing.noun}" for colour in mini.COLOURS if colour != large.thing.colour]
    mixed = [f"{colour} {noun}" for colour in colours for noun in nouns if f"{colour} {noun}" not in names]
    return str(rng.choice(other)), str(rng.choice(mixed or other))


def measure(model, processor, grid: int, count: int, shift: bool) -> list[Result]:
    overlaps, marked, looks, seconds = [], [], [], []
    for number in range(count):
        image, mask, large = picture(FIRST_SEED * grid + number, grid, shift)
        started = time.process_time()
        found = search(model, processor, image, large.thing.name)
        seconds.append(time.process_time() - started)
        looks.append(found.looks)
        inside = found.probability[0].numpy() > 0.5
        overlaps.append((inside & mask).sum() / (inside | mask).sum())
        absent = absent_names(large, number)[number % 2]
        marked.append((search(model, processor, image, absent).probability > 0.5).float().mean().item())
    name = f"grid {grid}{', shifted' if shift else ''}"
    found_bar, iou_bar, any_bar, share_bar = (
        (0.95, 0.85, 0.05, 0.02) if grid in (2, 3, 4) and not shift else [None] * 4
    )
    return [
        Result("search", f"found (IoU > 0.5), {name}", float(np.mean(np.array(overlaps) > 0.5)), found_bar),
        Result("search", f"mean IoU, {name}", float(np.mean(overlaps)), iou_bar),
        Result("search", f"an absent thing marked, {name}", float(np.mean(np.array(marked) > 0)), any_bar, True),
        Result("search", f"share of the picture marked for it, {name}", float(np.mean(marked)), share_bar, True),
        Result("search", f"the largest such share, {name}", float(np.max(marked))),
        Result("search", f"looks at a picture, {name}", float(np.mean(looks))),
        Result("search", f"CPU seconds a picture, {name}", float(np.mean(seconds))),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mask_model", default=mini.mask_model_path(), help="folder of the mask model")
    parser.add_argument("--grids", nargs="+", type=int, default=[2, 3, 4], help="scenes a side of the large pictures")
    parser.add_argument("--pictures", type=int, default=72, help="number of pictures a grid")
    parser.add_argument(
        "--shift", action="store_true", help="cut the pictures so that scenes and tiles do not line up"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model = CLIPSegForImageSegmentation.from_pretrained(args.mask_model).eval()
    processor = CLIPSegProcessor.from_pretrained(args.mask_model)
    for grid in args.grids:
        print(*measure(model, processor, grid, args.pictures, args.shift), sep="\n", flush=True)


if __name__ == "__main__":
    main()
