"""What an edit costs: IEditPipeline with a mask against the stock image-to-image and inpainting pipelines.

    python benchmarks/compare_pipelines.py --size mini
    python benchmarks/compare_pipelines.py --size sd

All three run on the same component objects, with the same noise, steps, strength and guidance, in turn and in one
process. `sd` has the architecture of Stable Diffusion 1.4 with random weights: time and memory do not depend on their
values, and nothing is downloaded. Memory is measured apart, in a fresh process for each method.
"""

import argparse
import gc
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import diffusers
import numpy as np
import psutil
import sd_size
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

from diffusers_iedit import IEditPipeline, mini


METHODS = {
    "img2img": StableDiffusionImg2ImgPipeline,
    "inpaint": StableDiffusionInpaintPipeline,
    "iedit": IEditPipeline,
}
BASELINE = "img2img"
PROMPT = "a blue car on green grass"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("mini", "sd"), default="mini", help="which models")
    parser.add_argument("--resolution", type=int, help="side of the picture (default: 64 for mini, 256 for sd)")
    parser.add_argument("--steps", type=int, help="steps at strength 1 (default: 50 for mini, 6 for sd)")
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--repeats", type=int, help="timed edits of each method (default: 20 for mini, 5 for sd)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    defaults = {
        "mini": {"resolution": 64, "steps": 50, "repeats": 20},
        "sd": {"resolution": 256, "steps": 6, "repeats": 5},
    }
    for name, value in defaults[args.size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def build_components(size: str, device: str) -> dict:
    """The components of a Stable Diffusion pipeline, half precision on CUDA."""
    dtype = torch.float16 if device == "cuda" else torch.float32
    if size == "mini":
        unused = {"mask_model": None, "mask_processor": None}
        pipe = IEditPipeline.from_pretrained(mini.model_path(), dtype=dtype, **unused).to(device)
        components = {
            name: pipe.components[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
        }
    else:
        torch.manual_seed(0)
        components = {name: sd_size.build(name, dtype, device) for name in ("vae", "text_encoder", "unet")}
        components["tokenizer"] = sd_size.tokenizer()
        components["scheduler"] = DDIMScheduler(**sd_size.SCHEDULER)
    return components | {"safety_checker": None, "feature_extractor": None}


def make_edit(method: str, components: dict, args: argparse.Namespace):
    """A function of no arguments that runs one whole edit, from picture to picture."""
    pipe = METHODS[method](**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    side = args.resolution
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    inputs = {
        "prompt": PROMPT,
        "image": Image.fromarray(noise),
        "strength": args.strength,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
    }
    if method != "img2img":
        inputs["mask_image"] = Image.new("L", (side, side), 0)
        ImageDraw.Draw(inputs["mask_image"]).rectangle((side // 4, side // 4, side * 3 // 4, side * 3 // 4), fill=255)
    if method == "inpaint":
        inputs |= {"height": side, "width": side}
    return lambda: pipe(**inputs, generator=torch.Generator().manual_seed(0)).images[0]


def measure_times(edits: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each edit, taken in turn so that what else the machine does meets all methods alike."""
    for edit in edits.values():
        edit()
    seconds = {method: [] for method in edits}
    for _ in range(repeats):
        for method, edit in edits.items():
            gc.collect()
            start = time.perf_counter()
            edit()
            seconds[method].append(time.perf_counter() - start)
    return seconds


def measure_memory_here(method: str, args: argparse.Namespace, device: str) -> dict[str, float]:
    """MiB that one edit takes in this process: at its peak, and by how much that is more than the loaded models."""
    edit = make_edit(method, build_components(args.size, device), args)
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        loaded = torch.cuda.memory_allocated()
        edit()
        peak = torch.cuda.max_memory_allocated()
    else:
        loaded = psutil.Process().memory_info().rss
        edit()
        # In KiB on Linux, in bytes on macOS.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)
    return {"peak_mib": peak / 2**20, "peak_over_models_mib": (peak - loaded) / 2**20}


def measure_memory(method: str, args: argparse.Namespace) -> dict[str, float]:
    """`measure_memory_here` in a process of its own, as a process's peak never falls again."""
    options = ("size", "resolution", "steps", "strength", "guidance_scale")
    argv = [part for name in options for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *argv, "--memory-of", method]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main():
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory_of is not None:
        print(json.dumps(measure_memory_here(args.memory_of, args, device)))
        return

    memory = {method: measure_memory(method, args) for method in METHODS}
    components = build_components(args.size, device)
    seconds = measure_times({method: make_edit(method, components, args) for method in METHODS}, args.repeats)

    results = {}
    for method in METHODS:
        ratios = [own / base for own, base in zip(seconds[method], seconds[BASELINE], strict=True)]
        results[method] = {
            "median_seconds": statistics.median(seconds[method]),
            "median_time_ratio": statistics.median(ratios),
            **memory[method],
            "peak_ratio": memory[method]["peak_mib"] / memory[BASELINE]["peak_mib"],
            "seconds": seconds[method],
        }
    settings = {
        **{name: getattr(args, name) for name in ("size", "resolution", "steps", "strength", "guidance_scale")},
        "repeats": args.repeats,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(components["unet"].dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(f"{'method':<9}{'median s':>10}{'time ratio':>12}{'peak MiB':>10}{'over models':>13}{'peak ratio':>12}")
    for method, result in results.items():
        print(
            f"{method:<9}{result['median_seconds']:>10.3f}{result['median_time_ratio']:>12.3f}"
            f"{result['peak_mib']:>10.0f}{result['peak_over_models_mib']:>13.0f}{result['peak_ratio']:>12.3f}"
        )
    if args.json is not None:
        with open(args.json, "w") as file:
            json.dump({"settings": settings, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
