"""What an edit of a thing in a large picture costs, from stock image-to-image to all levers of speed, one by one.

    OMP_NUM_THREADS=1 python benchmarks/local_edit.py
    python benchmarks/local_edit.py --device cuda --run-steps 40
    OMP_NUM_THREADS=1 python benchmarks/local_edit.py --size mini --run-steps 40 --examples 8

Two parts, whose figures stand in one table, a row a lever; each row has the levers of the rows above it too:

- `cost`: a picture of 1024 pixels in which a square of 1/16 of its area is to change, by models of the size of Stable
  Diffusion 1.4 with random weights. The first row is `StableDiffusionImg2ImgPipeline` as it comes: float32, 50
  steps at strength 0.8, guidance 7.5, the whole frame. Each row has a process of its own, in turn, `--rounds` times.
- `quality`: the same settings of the mini models, in a picture of 4 x 4 scenes, in one of which a thing is swapped.
  Success is what an independent classifier sees where the thing was; PSNR is to the true picture, where the edit or
  the thing before it is.

Of an edit, so many steps are run as `--run-steps` says, of each kind (guided or not), or all if there are no more; its
time is that of encoding, decoding and the rest, plus that of a step times the number of steps. Without a GPU and with
one thread, seconds are CPU seconds, which is the time it takes on an idle machine; else they are those of the clock.
Peak memory is what the process takes beyond what it had before it built the models; on CUDA, what PyTorch allocates.
"""

import argparse
import json
import logging
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import psutil
import sd_size
import torch
import transformers
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from regions import DILATION, FEW_EXAMPLES, FIRST_SEED, ask, padding_of, psnr_inside, verdict

from diffusers_iedit import IEditPipeline, acceleration, mini
from diffusers_iedit.mini.judging import Judge
from diffusers_iedit.regions_iedit import automatic_padding


ROWS = ("stock", "region", "precision", "few steps", "guidance", "tiny VAE")
STOCK, REGION, PRECISION, FEW_STEPS, GUIDANCE, TINY_VAE = range(len(ROWS))
"""A row has its lever and those before it."""

DEFAULTS = {"strength": 0.8, "num_inference_steps": 50, "guidance_scale": 7.5}
"""Of `StableDiffusionImg2ImgPipeline`."""

GUIDED_SHARE = 0.5
GRID, BATCH_SIZE = 4, 16
PARTS = ("cost", "quality")
BARS = {"speed": 40, "memory": 0.6, "success": 0.03}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, help="of the table; `cost` needs stock too")
    parser.add_argument("--size", choices=("sd", "mini"), default="sd", help="the models of `cost`")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run-steps", type=int, default=1, help="steps of each kind to run; 40 are all")
    parser.add_argument("--rounds", type=int, default=1, help="processes a row")
    parser.add_argument("--examples", type=int, default=64, help="edits a row of `quality`; 16 whole frames at most")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--markdown", metavar="FILE", help="also write the table there")
    parser.add_argument("--row", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "cost" in args.only and ROWS[STOCK] not in args.rows:
        parser.error("`cost` is that of stock in each row: --rows stock ...")
    return args


def seconds_of(device: str) -> Callable[[], float]:
    """The clock."""
    if device == "cuda":

        def clock():
            torch.cuda.synchronize()
            return time.perf_counter()

        return clock
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def build_components(size: str, dtype: torch.dtype, device: str, tiny_vae: bool) -> dict[str, Any]:
    """What both pipelines are made of."""
    vae = "tiny_vae" if tiny_vae else "vae"
    if size == "sd":
        torch.manual_seed(0)
        components = {name: sd_size.build(name, dtype, device) for name in (vae, "text_encoder", "unet")}
        components["vae"] = components.pop(vae)
        components["tokenizer"] = sd_size.tokenizer()
        components["scheduler"] = DDIMScheduler(**sd_size.SCHEDULER)
    else:
        unused = {"mask_model": None, "mask_processor": None, "captioner": None, "caption_processor": None}
        if tiny_vae:
            unused["vae"] = AutoencoderTiny.from_pretrained(mini.tiny_vae_path(), torch_dtype=dtype)
        pipe = IEditPipeline.from_pretrained(mini.model_path(), dtype=dtype, **unused).to(device)
        components = {
            name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        }
    return components | {"safety_checker": None, "feature_extractor": None}


def load(row: int, size: str, device: str) -> tuple[Any, dict[str, Any]]:
    """The pipeline of a row, and what its calls take."""
    diffusers.utils.logging.set_verbosity_error()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    dtype = acceleration.fast_dtype(device) if row >= PRECISION else torch.float32
    components = build_components(size, dtype, device, tiny_vae=row >= TINY_VAE)
    pipeline_class = IEditPipeline if row >= REGION else StableDiffusionImg2ImgPipeline
    pipe, settings = pipeline_class(**components, requires_safety_checker=False), dict(DEFAULTS)
    if row >= PRECISION:
        acceleration.prepare(pipe, device, dtype)
    if row >= FEW_STEPS:
        pipe, few = acceleration.few_steps(pipe)
        settings |= few
    pipe.set_progress_bar_config(disable=True)
    return pipe, settings


def share_out(row: int, steps: int) -> tuple[int, int]:
    """Of so many steps, those with guidance and those without."""
    guided = math.ceil(GUIDED_SHARE * steps) if row >= GUIDANCE else steps
    return guided, steps - guided


# What it costs


def make_edit(row: int, size: str, pipe, settings: dict[str, Any]) -> Callable:
    """A function that edits the picture of `cost`: with other settings if need be, as its arguments."""
    own, side = (mini.SIZE, GRID * mini.SIZE) if size == "mini" else (512, 1024)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    arguments = settings | {"prompt": "a blue car on green grass", "image": Image.fromarray(noise)}
    if row >= REGION:
        mask = torch.zeros(1, side, side)
        first, last = side // 2 - side // 8, side // 2 + side // 8
        mask[:, first:last, first:last] = 1
        arguments |= {"mask_image": mask, "padding_mask_crop": automatic_padding(mask, own)}
    return lambda **changes: pipe(**(arguments | changes), generator=torch.Generator().manual_seed(0))


def measure_edit(row: int, size: str, device: str, run_steps: int) -> dict[str, float]:
    """Seconds and MiB of one edit, in this process."""
    torch.zeros(1, device=device)
    before = psutil.Process().memory_info().rss
    pipe, settings = load(row, size, device)
    edit, clock = make_edit(row, size, pipe, settings), seconds_of(device)
    steps = int(settings["num_inference_steps"] * settings["strength"])
    run = min(steps, run_steps * (2 if row >= GUIDANCE else 1))
    if run < steps:
        edit = partial(edit, num_inference_steps=math.ceil(run / settings["strength"]))
    cutoff = acceleration.GuidanceCutoffCallback(GUIDED_SHARE) if row >= GUIDANCE else None
    stamps: list[float] = []
    spent = dict.fromkeys(("encode", "decode"), 0.0)

    def at_begin(*_):
        # Later steps begin where the one before ends.
        if not stamps:
            stamps.append(clock())

    def at_end(pipe, *step):
        stamps.append(clock())
        return cutoff(pipe, *step) if cutoff else step[-1]

    def timed(part, method, *args, **kwargs):
        start = clock()
        result = method(*args, **kwargs)
        spent[part] += clock() - start
        return result

    edit = partial(edit, callback_on_step_end=at_end)
    if device == "cuda":
        # The first edit chooses kernels.
        edit()
        torch.cuda.reset_peak_memory_stats()
    stamps.clear()
    begins = pipe.unet.register_forward_pre_hook(at_begin)
    with ExitStack() as stack:
        for part in spent:
            stack.enter_context(mock.patch.object(pipe.vae, part, partial(timed, part, getattr(pipe.vae, part))))
        start = clock()
        edit()
        total = clock() - start
    begins.remove()
    durations = np.diff(stamps)
    number_guided, number_plain = share_out(row, steps)
    guided, plain = np.split(durations, [share_out(row, run)[0]])
    found = {
        "encode": spent["encode"],
        "guided step": float(np.median(guided)),
        "plain step": float(np.median(plain)) if len(plain) else 0.0,
        "decode": spent["decode"],
        "rest": total - float(durations.sum()) - spent["encode"] - spent["decode"],
        "guided steps": number_guided,
        "plain steps": number_plain,
        "steps run": len(durations),
    }
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        # In KiB on Linux, in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
        peak -= before
    return found | {"peak MiB": peak / 2**20, "dtype": str(pipe.unet.dtype).removeprefix("torch.")}


def measure_in_a_process(row: int, args: argparse.Namespace) -> dict[str, float]:
    """`measure_edit` in a process of its own, as a process's peak never falls again."""
    options = {"--size": args.size, "--device": args.device, "--run-steps": args.run_steps, "--row": row}
    command = [sys.executable, __file__, *(str(part) for option in options.items() for part in option)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def whole(found: dict[str, float]) -> float:
    """Seconds of a whole edit, from its parts."""
    steps = sum(found[f"{kind} steps"] * found[f"{kind} step"] for kind in ("guided", "plain"))
    return found["encode"] + steps + found["decode"] + found["rest"]


def measure_cost(args: argparse.Namespace) -> dict[str, dict]:
    """By row: medians over the rounds, and those of the ratios to the first row of the same round."""
    rounds: list[dict[str, dict]] = []
    for _ in range(args.rounds):
        rounds.append({})
        for row, name in enumerate(ROWS):
            if name in args.rows:
                rounds[-1][name] = found = measure_in_a_process(row, args)
                # Whoever stops it has what was measured.
                print(f"{name}: {whole(found):.2f} s: {json.dumps(found)}", file=sys.stderr, flush=True)
    results = {}
    for name in rounds[0]:
        own, stock = ([each[row] for each in rounds] for row in (name, ROWS[STOCK]))
        speed = [whole(base) / whole(found) for found, base in zip(own, stock, strict=True)]
        memory = [found["peak MiB"] / base["peak MiB"] for found, base in zip(own, stock, strict=True)]
        results[name] = {
            key: value if isinstance(value, str) else statistics.median(each[key] for each in own)
            for key, value in own[0].items()
        } | {
            "seconds": statistics.median(map(whole, own)),
            "speed": statistics.median(speed),
            "memory": statistics.median(memory),
        }
    return results


# What it gives


def measure_quality(rows: Sequence[str], device: str, examples: int) -> dict[str, dict[str, float]]:
    """By row: the share of edits that succeed, their mean PSNR in dB where something changes, and their number."""
    # That whole frames are large is what is measured.
    logging.getLogger("diffusers_iedit").setLevel(logging.ERROR)
    judge = Judge.from_pretrained(mini.judge_path())
    results = {}
    for row, name in enumerate(ROWS):
        if name not in rows:
            continue
        pipe, settings = load(row, "mini", device)
        right, psnr = [], []
        count = examples if row >= REGION else min(examples, FEW_EXAMPLES)
        for start in range(0, count, BATCH_SIZE):
            numbers = range(start, min(start + BATCH_SIZE, count))
            scenes = [mini.render_large(FIRST_SEED + number, GRID) for number in numbers]
            targets = [ask(scene, number) for scene, number in zip(scenes, numbers, strict=True)]
            arguments = settings | {
                "prompt": [target.caption for target in targets],
                "image": [scene.image for scene in scenes],
                "generator": [torch.Generator().manual_seed(number) for number in numbers],
            }
            if row >= REGION:
                masks = [scene.mask for scene in scenes]
                arguments |= {"mask_image": masks, "mask_dilation": DILATION}
                arguments["padding_mask_crop"] = max(map(padding_of, masks))
            if row >= GUIDANCE:
                arguments["callback_on_step_end"] = acceleration.GuidanceCutoffCallback(GUIDED_SHARE)
            images = pipe(**arguments).images
            seen = judge.look(images, [target.mask for target in targets])
            for scene, target, image, thing in zip(scenes, targets, images, seen, strict=True):
                right.append((thing.noun, thing.colour) == (target.thing.noun, target.thing.colour))
                there = np.maximum(np.asarray(scene.mask), np.asarray(target.mask)) > 0
                psnr.append(psnr_inside(image, target.image, there))
        results[name] = {"success": float(np.mean(right)), "psnr": float(np.mean(psnr)), "edits": count}
        print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    return results


# The table


def title_of(row: int, results: dict[str, Any]) -> str:
    dtype = results.get("cost", {}).get(ROWS[row], {}).get("dtype", "the machine's precision")
    few = acceleration.FEW_STEPS
    return (
        "stock image-to-image, whole frame",
        "+ the region alone, at the model's size",
        f"+ {dtype}, channels last",
        f"+ DPM-Solver++ of {few['num_inference_steps']} steps, guidance {few['guidance_scale']:g}",
        f"+ guidance in {GUIDED_SHARE:.0%} of the steps",
        "+ a tiny VAE: all",
    )[row]


def write_table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| edit | seconds: encode + steps + decode + rest | times as fast | peak memory | of stock's | success on mini"
        " | PSNR on mini |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, name in enumerate(ROWS):
        if not any(name in results.get(part, {}) for part in PARTS):
            continue
        cells = [title_of(row, results)]
        if cost := results.get("cost", {}).get(name):
            steps = " + ".join(
                f"{cost[f'{kind} steps']:.0f} x {cost[f'{kind} step']:.3g}"
                for kind in ("guided", "plain")
                if cost[f"{kind} steps"]
            )
            cells += [
                f"{cost['encode']:.3g} + {steps} + {cost['decode']:.3g} + {cost['rest']:.2g} = {cost['seconds']:.4g}",
                f"{cost['speed']:.1f}",
                f"{cost['peak MiB']:,.0f} MiB",
                f"{cost['memory']:.2f}",
            ]
        else:
            cells += [""] * 4
        if quality := results.get("quality", {}).get(name):
            right = round(quality["success"] * quality["edits"])
            cells += [f"{right} of {quality['edits']}", f"{quality['psnr']:.1f} dB"]
        else:
            cells += [""] * 2
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_bars(results: dict[str, Any]) -> str:
    """What is demanded of all levers together, and whether they give it."""
    lines = []
    if ROWS[-1] in results.get("cost", {}):
        speed, memory = (results["cost"][ROWS[-1]][name] for name in ("speed", "memory"))
        lines = [
            f"all levers: {speed:.1f} times as fast (bar {BARS['speed']} {verdict(speed >= BARS['speed'])})",
            f"peak memory: {memory:.2f} of stock's (bar {BARS['memory']} {verdict(memory <= BARS['memory'])})",
        ]
    if {ROWS[REGION], ROWS[-1]} <= results.get("quality", {}).keys():
        slow, fast = (results["quality"][ROWS[row]]["success"] for row in (REGION, len(ROWS) - 1))
        lines.append(
            f"success {fast:.3f}, of the region in {DEFAULTS['num_inference_steps']} steps {slow:.3f} (at most"
            f" {BARS['success']} less: {verdict(fast >= slow - BARS['success'])})"
        )
    return "\n".join(lines)


def main():
    args = parse_args()
    if args.row is not None:
        print(json.dumps(measure_edit(args.row, args.size, args.device, args.run_steps)))
        return
    results: dict[str, Any] = {
        "settings": {
            "size": args.size,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device,
            "threads": torch.get_num_threads(),
            "run steps": args.run_steps,
            "rounds": args.rounds,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        }
    }
    if "cost" in args.only:
        results["cost"] = measure_cost(args)
    if "quality" in args.only:
        results["quality"] = measure_quality(args.rows, args.device, args.examples)
    print(", ".join(f"{name} {value}" for name, value in results["settings"].items()))
    print(table := write_table(results))
    print(write_bars(results))
    if args.markdown is not None:
        Path(args.markdown).write_text(table + "\n")
    if args.json is not None:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
