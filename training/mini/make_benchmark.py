"""Writes the generated half of the mini benchmark, sampled by the mini LDM before its fine-tuning as iEdit."""

import argparse
import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage
from scipy.ndimage import label

from diffusers_iedit import mini
from diffusers_iedit.evaluation.data import GENERATED_FILE, MINI_SPLITS, ask_for_edit, things_shown
from diffusers_iedit.finetuning.families import load_base
from diffusers_iedit.masking_iedit import segment
from diffusers_iedit.mini import Scene
from diffusers_iedit.mini.judging import Judge


SEED_OFFSET = 5_000
"""From the first seed of a split to the first one here; between them lie those of the drawn half."""

SETTINGS = {"num_inference_steps": 50, "guidance_scale": 1.5}
"""More guidance sharpens nothing and smudges what surrounds the things."""

LIKENESS = 0.75
"""The least IoU of a mask and the drawn thing, brought to the same height and place."""

BATCH_SIZE = 32

FEATURES = Features(
    {
        "split": Value("string"),
        # Of `mini.render`, which says what to show and what to edit, and of the noise.
        "seed": Value("int32"),
        "image": Image(),
        "mask": Image(),
        "source_caption": Value("string"),
        "edit_prompt": Value("string"),
        "source_term": Value("string"),
        "target_term": Value("string"),
        # What a right edit shows.
        "noun": Value("string"),
        "colour": Value("string"),
        "scene": Value("string"),
    }
)


def fault(scene: Scene, image: PILImage.Image, mask: PILImage.Image, judge: Judge) -> str | None:
    """Why a sample for the scene's caption, with CLIPSeg's mask of the thing to edit, is not taken."""
    wanted = [(thing.noun, thing.colour) for thing in scene.things]
    places = [None] if len(wanted) == 1 else ["left", "right"]
    if [(seen.noun, seen.colour) for seen in judge.look([image] * len(places), places)] != wanted:
        return "not the things of the caption"
    if judge.look([image])[0].scene != scene.scene:
        return "not the scene of the caption"
    if label(mask)[1] != 1:
        return "a mask that is not in one piece"
    left, top, _, bottom = mask.getbbox()
    drawn = scene.mask.crop(scene.mask.getbbox())
    if not 0.75 < (bottom - top) / drawn.height < 1.33:
        return "a mask of another size"
    like = PILImage.new("L", mask.size)
    like.paste(drawn.resize((round(drawn.width * (bottom - top) / drawn.height), bottom - top)), (left, top))
    found, expected = np.asarray(mask) > 127, np.asarray(like) > 127
    if (found & expected).sum() < LIKENESS * (found | expected).sum():
        return "a mask of another shape"
    return None


def encode(image: PILImage.Image) -> dict:
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return {"bytes": png.getvalue(), "path": None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=GENERATED_FILE, help="the Parquet file")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    pipe, judge = load_base("mini-base"), Judge.from_pretrained(mini.judge_path())
    components = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    text_to_image = StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    text_to_image.set_progress_bar_config(disable=True)

    rows, left_out = [], Counter()
    for split, (first_seed, count) in MINI_SPLITS.items():
        seeds, taken = itertools.count(first_seed + SEED_OFFSET), {}
        while missing := [number for number in range(count) if number not in taken][:BATCH_SIZE]:
            batch = list(zip(missing, seeds, strict=False))
            scenes = [mini.render(seed, things=things_shown(number), split="held_out") for number, seed in batch]
            images = text_to_image(
                [scene.caption for scene in scenes],
                generator=[torch.Generator().manual_seed(seed) for _, seed in batch],
                **SETTINGS,
            ).images
            terms = [scene.thing.name for scene in scenes]
            probabilities = segment(pipe.mask_model, pipe.mask_processor, images, terms)[:, 0].numpy()
            masks = [PILImage.fromarray(np.uint8(255) * (probability > 0.5)) for probability in probabilities]
            for (number, seed), source, image, mask in zip(batch, scenes, images, masks, strict=True):
                if reason := fault(source, image, mask, judge):
                    left_out[reason] += 1
                    continue
                target = ask_for_edit(source, number)
                taken[number] = {
                    "split": split,
                    "seed": seed,
                    "image": encode(image),
                    "mask": encode(mask),
                    "source_caption": source.caption,
                    "edit_prompt": target.caption,
                    "source_term": source.thing.name,
                    "target_term": target.thing.name,
                    "noun": target.thing.noun,
                    "colour": target.thing.colour,
                    "scene": target.scene,
                }
            print(f"{split}: {len(taken)} of {count}; left out so far: {dict(left_out)}", flush=True)
        rows += [taken[number] for number in range(count)]

    args.output.parent.mkdir(parents=True, exist_ok=True)
    partial = args.output.with_suffix(".partial")
    Dataset.from_list(rows, features=FEATURES).to_parquet(partial)
    partial.replace(args.output)


if __name__ == "__main__":
    main()
