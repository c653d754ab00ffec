"""Writes a pool: pictures of the mini world with captions as noisy as the web's, and apart from it what each shows."""

import argparse
import hashlib
import io
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from common import FIRST_TRAINING_SEED
from datasets import Dataset, Features, Image, Value

from diffusers_iedit.mini import Scene, render


FIRST_SEED = 200_000
"""New to the models, and apart from the seeds with which these are watched and measured."""

SIZES = ("12x18 cm", "XL", "size 42", "64x64", "4K", "A3")
NOISE = (
    *("NEW", "2023", "2024 edition", "-50%", "SALE!!!", "toy", "gift", "stock photo", "HD wallpaper", "free shipping"),
    *("buy now", "| Kolvera", "by Lumbrix", "Tarnow&Co", "vol. 2", "#cute", "set of 3", "vintage", "(pack)", "$9.99"),
)
EMOJI = ("🔥", "😍", "✨", "👍", "💯", "🎁")


def web_caption(scene: Scene, rng: random.Random) -> str:
    """What a shop or an album might write beside the picture: at best the caption, at worst a file's name."""
    kind = rng.random()
    if kind < 0.1:
        return scene.caption
    if kind < 0.13:
        return f"IMG_{rng.randrange(10_000):04}.JPG"

    words = []
    for thing in scene.things:
        words.append(thing.name if rng.random() < 0.75 else thing.noun)
    if rng.random() < 0.5:
        words.append(scene.scene.split()[-1])
    if rng.random() < 0.25:
        words = " ".join(words).split()
        rng.shuffle(words)
    noise = rng.sample(NOISE, rng.randint(1, 3))
    if rng.random() < 0.3:
        noise.append(rng.choice(SIZES))
    if rng.random() < 0.2:
        noise.append(rng.choice(EMOJI))
    for word in noise:
        words.insert(rng.randint(0, len(words)), word)
    text = rng.choice([" ", " ", " ", ", ", " - "]).join(words)
    return rng.choice([text, text, text.title(), text.upper()])


def make_row(seed: int, split: str | None) -> tuple[bytes, str]:
    """The picture of a seed, as PNG, and its noisy caption; odd seeds show two things."""
    scene = render(seed, things=1 + seed % 2, split=split)
    png = io.BytesIO()
    scene.image.save(png, "PNG")
    # Not the seed alone: `render` draws the scene from that, and the noise would go with what it shows.
    return png.getvalue(), web_caption(scene, random.Random(f"caption {seed}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="a new folder for the Parquet files (image, text); beside it, as NAME-truth.parquet, comes for each"
        " picture's SHA-256 what draws it: `mini.render(seed, things=things, split=split)`",
    )
    parser.add_argument("--count", type=int, default=20_000, help="number of pictures")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="of the first picture; the others follow it")
    parser.add_argument(
        "--split", choices=["train", "held_out", "all"], default="train", help="which combinations are shown"
    )
    parser.add_argument("--rows_per_file", type=int, default=2_500)
    args = parser.parse_args()
    seeds = range(args.seed, args.seed + args.count)
    if not FIRST_SEED <= args.seed < seeds.stop <= FIRST_TRAINING_SEED:
        parser.error(
            f"--seed and --count have to give seeds in [{FIRST_SEED}, {FIRST_TRAINING_SEED}), but give"
            f" [{seeds.start}, {seeds.stop}): the others served to train and to measure the models."
        )
    if args.output_dir.exists():
        parser.error(f"--output_dir {args.output_dir} exists already.")

    # Under its final name, the pool is complete.
    output, split = args.output_dir, None if args.split == "all" else args.split
    unfinished = output.with_name(f"{output.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    truth = {
        "sha256": [],
        "seed": list(seeds),
        "things": [1 + seed % 2 for seed in seeds],
        "split": [split] * len(seeds),
    }
    features = Features({"image": Image(), "text": Value("string")})
    starts = range(0, len(seeds), args.rows_per_file)
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        for number, start in enumerate(starts):
            chunk = seeds[start : start + args.rows_per_file]
            pngs, texts = zip(*workers.map(partial(make_row, split=split), chunk, chunksize=64), strict=True)
            rows = {"image": [{"bytes": png, "path": None} for png in pngs], "text": list(texts)}
            file = unfinished / f"train-{number:05}-of-{len(starts):05}.parquet"
            Dataset.from_dict(rows, features=features).to_parquet(file)
            truth["sha256"] += [hashlib.sha256(png).hexdigest() for png in pngs]
    truth_file = output.with_name(f"{output.name}-truth.parquet")
    part = truth_file.with_suffix(".partial")
    Dataset.from_dict(truth).to_parquet(part)
    part.replace(truth_file)
    unfinished.rename(output)


if __name__ == "__main__":
    main()
