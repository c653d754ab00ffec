"""Small things in large pictures: whether they are found and changed, without a seam, and what that costs.

    OMP_NUM_THREADS=1 python benchmarks/regions.py
    OMP_NUM_THREADS=1 python benchmarks/regions.py --only grids --grids 4 --examples 16
    OMP_NUM_THREADS=1 python benchmarks/regions.py --only grids --processes 16

Three parts, on the mini models:

- `grids`: one small thing is swapped in a picture of grid x grid scenes, `mini.render_large`. With its surroundings
  cut out (`padding_mask_crop`, a quarter of the mask's longer side), on the whole frame, and on a small copy of the
  frame (`processing_resolution`). An independent classifier judges whether the right thing in the right colour is
  there.
- `seam`: how far the colours of an edit are from the true edited picture's along its rim, without and with the
  correction by what surrounds the mask (`match_colours`).
- `photo`: what an edit in a picture of 4000 x 3000 pixels costs beside the models.

Seconds are CPU seconds of one process; with one thread they are the time it takes on an idle machine. Each edit
depends on its own seed alone, so that the edits of `grids` can be shared among processes, one thread each.
"""

import argparse
import contextlib
import json
import logging
import multiprocessing
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import NamedTuple
from unittest import mock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tqdm import tqdm

from diffusers_iedit import IEditPipeline, mini, regions_iedit
from diffusers_iedit.evaluation import metrics
from diffusers_iedit.mini.judging import Judge
from diffusers_iedit.regions_iedit import automatic_padding, read_masks


# Seeds that no training and no other measurement uses.
FIRST_SEED, FIRST_SEAM_SEED = 300_000, 310_000
DILATION = 2
PHOTO_SIZE = (4000, 3000)
PARTS = ("grids", "seam", "photo")
# Above these, frames take minutes an edit.
LARGEST_WHOLE_GRID, FEW_EXAMPLES = 4, 16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--grids", nargs="+", type=int, default=[2, 3, 4, 6, 8], help="scenes a side")
    parser.add_argument("--examples", type=int, default=64, help="edits a grid, and pictures of the seam")
    parser.add_argument("--processes", type=int, default=1, help="that share the edits of `grids`, one thread each")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--memory-of", choices=("scene", "photo"), help=argparse.SUPPRESS)
    return parser.parse_args()


@cache
def load() -> tuple[IEditPipeline, Judge]:
    """What edits and what judges, once a process."""
    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    # That whole frames are large is what is measured.
    logging.getLogger("diffusers_iedit").setLevel(logging.ERROR)
    pipe = IEditPipeline.from_pretrained(mini.model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe, Judge.from_pretrained(mini.judge_path())


def ask(scene, number: int):
    """The true edit of example `number`: another thing or another colour, in turn."""
    things = scene.scenes[scene.focus].things if hasattr(scene, "scenes") else scene.things
    if number % 2 == 0:
        nouns = [noun for noun in mini.NOUNS if noun not in [thing.noun for thing in things]]
        return scene.swap(thing=nouns[number // 2 % len(nouns)])
    colours = [colour for colour in mini.COLOURS if colour not in [thing.colour for thing in things]]
    return scene.swap(colour=colours[number // 2 % len(colours)])


def padding_of(mask: Image.Image) -> int:
    plane = read_masks(mask, 1, mask.size[::-1])[0]
    return automatic_padding(plane, mini.SIZE)


class Task(NamedTuple):
    """One edit of `grids`."""

    grid: int
    way: str
    number: int


def tasks_of(grids: list[int], examples: int) -> list[Task]:
    """All edits of `grids`, interleaved: what else the machine does concerns all grids and ways alike."""
    tasks = []
    for grid in sorted(grids, reverse=True):
        counts = dict.fromkeys(("words alone, cut out", "given mask, cut out"), examples)
        counts["small copy"] = min(examples, FEW_EXAMPLES)
        if grid <= LARGEST_WHOLE_GRID:
            counts["whole frame"] = min(examples, FEW_EXAMPLES)
        tasks += [Task(grid, way, number) for way, count in counts.items() for number in range(count)]
    return sorted(tasks, key=lambda task: task.number)


def measure_task(task: Task) -> tuple[bool, float | None]:
    """Whether an edit succeeds, and its CPU seconds; None where the words found nothing to edit."""
    pipe, judge = load()
    scene = mini.render_large(FIRST_SEED + task.number, task.grid)
    target = ask(scene, task.number)
    arguments = {"mask_image": scene.mask, "mask_dilation": DILATION}
    if task.way == "small copy":
        arguments["processing_resolution"] = mini.SIZE
    if task.way == "given mask, cut out":
        arguments["padding_mask_crop"] = padding_of(scene.mask)
    start = time.process_time()
    if task.way == "words alone, cut out":
        try:
            (mask,) = pipe.predict_mask(scene.image, mask_prompt=scene.thing.name)
        except ValueError:  # nothing was found
            return False, None
        arguments |= {"mask_image": mask, "padding_mask_crop": padding_of(mask)}
    generator = torch.Generator().manual_seed(task.number)
    image = pipe(scene.image, target.caption, generator=generator, **arguments).images[0]
    seconds = time.process_time() - start
    (seen,) = judge.look([image], [target.mask])
    return (seen.noun, seen.colour) == (target.thing.noun, target.thing.colour), seconds


def warm_up() -> None:
    torch.set_num_threads(1)
    # The first edit pays for what is set up once.
    edit_of(load()[0], "scene")()


@contextlib.contextmanager
def shared_among(processes: int) -> Iterator[Callable]:
    """`map`, in this process or in several."""
    if processes == 1:
        warm_up()
        yield map
        return
    # A fork of a process that has loaded torch may hang.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=warm_up) as pool:
        yield pool.map


def measure_grids(grids: list[int], examples: int, processes: int) -> dict[int, dict[str, dict[str, float]]]:
    """Share of edits that succeed and median CPU seconds of an edit, by grid and by how the picture is edited."""
    tasks = tasks_of(grids, examples)
    with shared_among(processes) as map_tasks:
        found = dict(zip(tasks, tqdm(map_tasks(measure_task, tasks), total=len(tasks)), strict=True))
    results = {grid: {} for grid in grids}
    for grid, way in dict.fromkeys((task.grid, task.way) for task in tasks):
        successes, seconds = zip(*(each for task, each in found.items() if task[:2] == (grid, way)), strict=True)
        taken = [each for each in seconds if each is not None]
        results[grid][way] = {
            "success": statistics.mean(successes),
            "edits": len(successes),
            "seconds": statistics.median(taken or [float("nan")]),
        }
    return results


def boxed(mask: Image.Image, other: Image.Image, margin: int) -> np.ndarray:
    """Both masks' bounding box with so much of the background around it, bool (H, W)."""
    marked = (np.asarray(mask) > 0) | (np.asarray(other) > 0)
    (top, bottom), (left, right) = (np.flatnonzero(marked.any(axis))[[0, -1]] for axis in (1, 0))
    box = np.zeros_like(marked)
    box[max(top - margin, 0) : bottom + 1 + margin, max(left - margin, 0) : right + 1 + margin] = True
    return box


def psnr_inside(image: Image.Image, target: Image.Image, inside: np.ndarray) -> float:
    """PSNR in dB of those pixels that are marked, (H, W) bool, of one picture against another."""
    images = [torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].double() / 255 for each in (image, target)]
    return float(metrics.psnr(*images, torch.from_numpy(inside)[None, None].double()))


def measure_seam(pipe: IEditPipeline, judge: Judge, examples: int, guidance_scale: float) -> dict[str, dict]:
    """Of edits in a box around the thing, without and with `match_colours`: the colour error of the box's outermost
    two pixels against the true edited picture (8-bit levels, means over the rim and the three colours), PSNR of the
    box, and success."""
    rows = {"as decoded": [], "matched": []}
    for number in range(examples):
        scene = mini.render(FIRST_SEAM_SEED + number, things=1)
        target = ask(scene, number)
        box = boxed(scene.mask, target.mask, margin=6)
        inside = torch.from_numpy(box)
        rim = inside & (F.max_pool2d((~inside).float()[None, None], 5, 1, 2)[0, 0] > 0)
        truth = np.asarray(target.image, dtype=np.float64)
        for name, values in rows.items():
            unmatched = mock.patch.object(regions_iedit, "match_colours", lambda edited, *_: edited)
            with unmatched if name == "as decoded" else contextlib.nullcontext():
                image = pipe(
                    scene.image,
                    target.caption,
                    mask_image=box,
                    guidance_scale=guidance_scale,
                    generator=torch.Generator().manual_seed(number),
                ).images[0]
            difference = np.asarray(image, dtype=np.float64) - truth
            (seen,) = judge.look([image], [target.mask])
            values.append(
                {
                    "rim": np.abs(difference[rim.numpy()].mean(axis=0)).mean(),
                    "psnr": psnr_inside(image, target.image, box),
                    "success": (seen.noun, seen.colour) == (target.thing.noun, target.thing.colour),
                }
            )
    return {
        name: {key: float(np.mean([row[key] for row in values])) for key in values[0]} for name, values in rows.items()
    }


def make_photo() -> tuple[Image.Image, Image.Image]:
    """A picture of PHOTO_SIZE of noise, in it a scene of 600 pixels, and the mask of its thing."""
    noise = np.random.default_rng(0).integers(0, 256, (*PHOTO_SIZE[::-1], 3), dtype=np.uint8)
    photo, mask, scene = Image.fromarray(noise), Image.new("L", PHOTO_SIZE), mini.render(22)
    for whole, part in ((photo, scene.image), (mask, scene.mask)):
        whole.paste(part.resize((600, 600)), (2000, 1500))
    return photo, mask


def edit_of(pipe: IEditPipeline, what: str):
    """A function of no arguments that edits a scene of the models' size, or in a photo."""
    if what == "scene":
        scene = mini.render(22)
        photo, mask, options = scene.image, scene.mask, {}
    else:
        photo, mask = make_photo()
        options = {"padding_mask_crop": padding_of(mask), "mask_dilation": 20, "mask_feather": 8}
    return lambda: pipe(photo, "a red cat", mask_image=mask, generator=torch.Generator().manual_seed(0), **options)


def measure_outside(pipe: IEditPipeline) -> dict[str, float]:
    """CPU seconds of an edit in a photo, and of these those that its networks take."""
    spent = {"networks": 0.0}

    def timed(method):
        def call(*args, **kwargs):
            start = time.process_time()
            result = method(*args, **kwargs)
            spent["networks"] += time.process_time() - start
            return result

        return call

    edit = edit_of(pipe, "photo")
    edit()
    with contextlib.ExitStack() as stack:
        for model, name in ((pipe.unet, "forward"), (pipe.vae, "encode"), (pipe.vae, "decode")):
            stack.enter_context(mock.patch.object(model, name, timed(getattr(model, name))))
        start = time.process_time()
        edit()
        total = time.process_time() - start
    return {"seconds": total, "outside the networks": total - spent["networks"]}


def peak_bytes(what: str) -> int:
    """The peak memory of a process that loads the models and makes one edit."""
    output = subprocess.run([sys.executable, __file__, "--memory-of", what], check=True, stdout=subprocess.PIPE)
    return json.loads(output.stdout)


def measure_photo(pipe: IEditPipeline) -> dict[str, float]:
    copy = 3 * PHOTO_SIZE[0] * PHOTO_SIZE[1]
    copies = (peak_bytes("photo") - peak_bytes("scene")) / copy
    return measure_outside(pipe) | {"copies of the picture": copies}


def verdict(holds: bool) -> str:
    return "met" if holds else "MISSED"


def report_grids(results: dict[int, dict]) -> None:
    print(f"{'grid':>4} {'way':<22}{'success':>9}{'bar':>13}{'seconds':>9}{'edits':>7}")
    bars = {"given mask, cut out": 0.95, "words alone, cut out": 0.90}
    for grid, ways in results.items():
        for way, found in ways.items():
            bar = f"{bars[way]:.2f} {verdict(found['success'] >= bars[way])}" if way in bars else ""
            print(f"{grid:>4} {way:<22}{found['success']:>9.3f}{bar:>13}{found['seconds']:>9.2f}{found['edits']:>7}")
    cut = [ways["given mask, cut out"]["seconds"] for ways in results.values()]
    spread = max(cut) / min(cut)
    print(f"cut out, slowest over fastest grid: {spread:.2f} (bar 1.3 {verdict(spread <= 1.3)})")
    if "whole frame" in results.get(4, {}):
        ratio = results[4]["whole frame"]["seconds"] / results[4]["given mask, cut out"]["seconds"]
        print(f"grid 4, whole frame over cut out: {ratio:.1f} times the seconds (bar 10 {verdict(ratio >= 10)})")


def report_seam(guidance_scale: float, rows: dict[str, dict]) -> None:
    before, after = rows["as decoded"], rows["matched"]
    ratio = after["rim"] / before["rim"]
    same = after["psnr"] >= before["psnr"] and after["success"] >= before["success"]
    print(
        f"guidance {guidance_scale}: rim {before['rim']:.2f} -> {after['rim']:.2f} levels, ratio {ratio:.2f} (bar 0.4"
        f" {verdict(ratio <= 0.4)}); PSNR {before['psnr']:.2f} -> {after['psnr']:.2f}, success {before['success']:.3f}"
        f" -> {after['success']:.3f} (not lower: {verdict(same)})"
    )


def report_photo(found: dict[str, float]) -> None:
    outside = found["outside the networks"]
    print(
        f"{PHOTO_SIZE[0]} x {PHOTO_SIZE[1]}: {found['seconds']:.2f} s, outside the networks {outside:.2f} s (bar 2"
        f" {verdict(outside <= 2)}); peak memory that of an edit of the models' size and"
        f" {found['copies of the picture']:.1f} 8-bit copies of the picture"
    )


def main():
    args = parse_args()
    pipe, judge = load()
    if args.memory_of is not None:
        edit_of(pipe, args.memory_of)()
        # In KiB on Linux, in bytes on macOS.
        unit = 1 if platform.system() == "Darwin" else 1024
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
        return

    results = {"settings": {"examples": args.examples, "threads": torch.get_num_threads()}}
    if "grids" in args.only:
        results["grids"] = measure_grids(args.grids, args.examples, args.processes)
        report_grids(results["grids"])
    if "seam" in args.only:
        results["seam"] = {}
        for guidance_scale in (3.0, 7.5):
            rows = results["seam"][guidance_scale] = measure_seam(pipe, judge, args.examples, guidance_scale)
            report_seam(guidance_scale, rows)
    if "photo" in args.only:
        results["photo"] = measure_photo(pipe)
        report_photo(results["photo"])
    if args.json is not None:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
