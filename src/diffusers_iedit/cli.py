"""The `iedit` command: reads files and arguments, hands them to a pipeline or an editor, writes what comes back."""

import argparse
import contextlib
import dataclasses
import functools
import gc
import inspect
import logging
import math
import os
import platform
import secrets
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from . import __version__
from .images import open_image


if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from .batch import Picture
    from .editor import LocalEditor
    from .pipeline import IEditPipeline, IEditPipelineOutput
    from .regions_iedit import Photo


DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"

# As model_index.json has it, of what `IEditPipeline` edits with: told without the imports of all families.
STABLE_DIFFUSION = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")

# What each extension is written as, losslessly where the format can, as the background is meant to stay exact.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".bmp": ("BMP", {}),
    ".avif": ("AVIF", {"quality": 95, "subsampling": "4:4:4"}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}

# The formats among them that compress what was not edited anew.
LOSSY = ("AVIF", "JPEG")

# In pixels, of the formats that have one.
LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}

# Arguments that go to the pipeline under their own name, so that its defaults are the only ones. Of the strength, in
# which families differ too much, that of `IEditPipeline` is the default of all.
EDIT_ARGUMENTS = (
    "prompt",
    "mask_prompt",
    "source_prompt",
    "mask_threshold",
    "mask_dilation",
    "mask_feather",
    "strength",
    "num_inference_steps",
    "guidance_scale",
    "negative_prompt",
    "padding_mask_crop",
    "processing_resolution",
)
# Those of them that are the pipeline's own, also where `LocalEditor` calls it.
PIPELINE_ARGUMENTS = ("strength", "num_inference_steps", "guidance_scale", "negative_prompt")
# Classifier-free guidance, in pipelines whose `guidance_scale` is an input of a distilled model.
TRUE_GUIDANCE = "true_cfg_scale"
MASK_ARGUMENTS = ("prompt", "mask_prompt", "source_prompt", "mask_threshold", "mask_dilation", "mask_feather")

# The options that name what CLIPSeg is to look for.
WHERE = ("mask_prompt", "source_prompt")

GOES_ON = "Run the same command again to go on."

# Options with a second name: the pipelines'.
ALIASES = {"--num-inference-steps": "--steps"}

# Components that serve one purpose each; what a run does not need is neither downloaded nor loaded.
EDITING = (
    "vae",
    "text_encoder",
    "tokenizer",
    "unet",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)
MASKING = ("mask_model", "mask_processor")
CAPTIONING = ("captioner", "caption_processor")


class UserError(ValueError):
    """A mistake of the user's: `main` prints its message as one line and exits with 2."""


class FailedEditsError(Exception):
    """Some edits of many failed, and all others are there: `main` prints its message and exits with 1."""


class _Parser(argparse.ArgumentParser):
    def parse_known_args(self, args=None, namespace=None):
        # An option may be written with underscores too, as the training scripts have it, and by its second name.
        args, options_end = list(sys.argv[1:] if args is None else args), False
        for number, arg in enumerate(args):
            options_end = options_end or arg == "--"
            if arg.startswith("--") and not options_end:
                name, equals, value = arg.partition("=")
                name = name.replace("_", "-")
                args[number] = ALIASES.get(name, name) + equals + value
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _number(kind: type, condition: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """An argparse `type` for numbers of which `holds` is true; `condition` says in words which these are."""

    def parse(text: str):
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"has to be {condition}, but is {text}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]
    return parse


_COUNT = _number(int, "at least 1", lambda count: count >= 1)
_STRENGTH = _number(float, "above 0 and at most 1", lambda s: 0 < s <= 1)
_FINITE = _number(float, "a finite number", math.isfinite)
_PIXELS = _number(int, "at least 0", lambda pixels: pixels >= 0)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="iedit", description="Change one thing in a picture and keep the rest.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{edit,mask,batch,evaluate,demo}")

    # Options left out are left out of the namespace too, which leaves their defaults to the pipeline.
    files = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    files.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    files.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        required=True,
        help=f"where to write the result; the format follows the extension ({', '.join(FORMATS)})",
    )
    models = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    models.add_argument(
        "--model",
        metavar="NAME",
        default=DEFAULT_MODEL,
        help="a Hub id or folder of any image-to-image or editing model of diffusers (SD, SDXL, SD3, Flux, Flux"
        " Kontext, Flux.2, Qwen-Image, Qwen-Image-Edit, Z-Image, Chroma, Kolors ...); or, of the small models of the"
        " package, `mini`, `mini-sd3-iedit`, or `mini-base` and `mini-sd3`, from which they were fine-tuned (default:"
        " %(default)s)",
    )
    models.add_argument(
        "--device",
        choices=("cuda", "mps", "cpu"),
        default=None,
        help="where the models run; `cpu` helps where a GPU has too little memory (default: the first of these that"
        " is there)",
    )
    models.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of the models; `auto` is float16 on `cuda`, or bfloat16 for transformers such as SD3 and Flux, which"
        " overflow in float16; bfloat16 on a CPU that computes in it; else float32 (default: %(default)s)",
    )
    masks, settings = (_Parser(add_help=False, argument_default=argparse.SUPPRESS) for _ in range(2))
    _add_mask_settings(masks)
    _add_edit_settings(settings)

    _add_edit(commands, [files, models, masks, settings])
    _add_mask(commands, [files, models, masks])
    _add_batch(commands, [models, masks, settings])
    _add_evaluate(commands)
    _add_demo(commands, [models])
    return parser


def _add_edit(commands: Any, parents: list[argparse.ArgumentParser]):
    edit = commands.add_parser(
        "edit",
        parents=parents,
        argument_default=argparse.SUPPRESS,
        help="edit a picture towards a prompt",
    )
    edit.add_argument(
        "prompt",
        metavar="PROMPT",
        help="what the picture shows after the edit; for models that take instructions, what is to be done",
    )
    edit.add_argument(
        "--num-images",
        type=_COUNT,
        default=1,
        metavar="N",
        help="N results OUT-1 ... OUT-N, which have the seeds K ... K+N-1 (default: %(default)s)",
    )
    _add_vae(edit)
    edit.set_defaults(run=_edit)


def _add_mask(commands: Any, parents: list[argparse.ArgumentParser]):
    mask = commands.add_parser(
        "mask",
        parents=parents,
        argument_default=argparse.SUPPRESS,
        help="write the mask that `edit` would use",
    )
    where = mask.add_mutually_exclusive_group(required=True)
    _add_mask_prompts(where)
    mask.add_argument("--prompt", metavar="TEXT", help="the edit prompt that --source-prompt is compared with")
    mask.set_defaults(run=_mask)


def _add_batch(commands: Any, parents: list[argparse.ArgumentParser]):
    batch = commands.add_parser(
        "batch",
        parents=parents,
        argument_default=argparse.SUPPRESS,
        help="edit many pictures, as a file says",
        description="Edit many pictures. Stopped at any moment, the same command goes on. All options of an edit are"
        " for those jobs that do not say otherwise.",
    )
    batch.add_argument(
        "jobs",
        metavar="JOBS",
        help='a JSON object a line: {"image": "a.png", "prompt": "a red car", "mask_prompt": "car"}, and all else that'
        " `iedit edit` takes, by the names of its options (but for those of the model, and --num-images); files are"
        " relative to JOBS, `output` is relative to DIR (default: the line's number, as 000001.png). Or a data set"
        " with such columns: a folder or a Hub id",
    )
    batch.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="where the pictures and results.jsonl go"
    )
    batch.add_argument("--split", default="train", metavar="NAME", help="of a data set (default: %(default)s)")
    batch.add_argument(
        "--any-output", action="store_true", default=False, help="allow outputs that lie outside of DIR"
    )
    batch.add_argument(
        "--retry-failed", action="store_true", default=False, help="try again what failed in an earlier run"
    )
    batch.add_argument(
        "--batch-size",
        type=_COUNT,
        default=1,
        metavar="N",
        help="edit up to so many jobs together that have the same settings: faster, and no longer to the last bit what"
        " `iedit edit` gives (default: %(default)s)",
    )
    batch.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="this machine, whose GPUs are all used under `accelerate launch -m diffusers_iedit.cli batch`; or a Ray"
        " cluster, whose nodes have to see all files under the same paths (default: %(default)s)",
    )
    batch.add_argument(
        "--ray-address", default=None, metavar="ADDRESS", help="of the cluster, or auto (default: a local Ray)"
    )
    batch.add_argument("--num-workers", type=_COUNT, default=1, metavar="N", help="Ray: actors (default: %(default)s)")
    batch.add_argument(
        "--gpus-per-worker",
        type=_number(float, "at least 0", lambda gpus: 0 <= gpus < math.inf),
        default=None,
        metavar="G",
        help="Ray: GPUs of each actor; may be a fraction (default: one if there is one)",
    )
    _add_vae(batch)
    batch.set_defaults(run=_batch)


def _add_evaluate(commands: Any):
    evaluate = commands.add_parser(
        "evaluate",
        argument_default=argparse.SUPPRESS,
        help="measure how well methods change what was asked and keep the rest",
    )

    def add(name: str, **options):
        evaluate.add_argument(f"--{name}", **options)

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[float]:
        return [_STRENGTH(word) for word in words(text)]

    def networks(text: str) -> list[tuple[str, str]]:
        pairs = [word.partition("=") for word in words(text)]
        if not all(part and name for part, _, name in pairs):
            raise argparse.ArgumentTypeError(f"has to be PART=NAME, as in clip=mini, joined by commas, but is {text}")
        return [(part, name) for part, _, name in pairs]

    add(
        "data",
        required=True,
        metavar="SET",
        help="mini, pie-bench:DIR, or a folder or a Hub id: a set of pairs, PIE-Bench++, MagicBrush or another public"
        " set of edits",
    )
    add("output-dir", required=True, type=Path, metavar="DIR", help="where results.json, results.md, index.html go")
    add("model", default=DEFAULT_MODEL, metavar="NAME", help="the fine-tuned model (default: %(default)s)")
    add(
        "base-model",
        metavar="NAME",
        help="what it was fine-tuned from (default: what MODEL/training_args.json names; mini-base for mini; or else"
        f" {DEFAULT_MODEL})",
    )
    add("instruct-model", metavar="NAME", help="an InstructPix2Pix model, for instruct-pix2pix")
    add(
        "methods",
        type=words,
        action="extend",
        metavar="NAMES",
        help="joined by commas: sdedit, sdedit-m, sdedit-given, iedit, iedit-m, iedit-given, blended, inpaint,"
        " instruct-pix2pix, module:Class, or editor:MODEL and editor-m:MODEL, which edit with any image-to-image or"
        " editing model (a Hub id, a folder or mini-sd3) in the given mask and in the predicted one;"
        " NAME@SETTING=VALUE changes a setting for one of them; differences are taken from the first (default:"
        " sdedit,sdedit-m,iedit,iedit-m)",
    )
    add("split", metavar="NAME", help="of the data")
    add("caption-model", metavar="NAME", help="BLIP: Hub id, folder or mini, for a set of edits that has no captions")
    add("num-examples", type=_COUNT, metavar="N", help="take only the first of each group")
    add("strength", type=_STRENGTH, metavar="S", help="of all methods (default: 0.7)")
    add("guidance-scale", type=_FINITE, metavar="G", help="of all methods (default: 7.5)")
    add(
        "steps",
        dest="num_inference_steps",
        type=_COUNT,
        metavar="N",
        help="denoising steps at strength 1 (default: 50); --num-inference-steps is the same",
    )
    add("mask-dilation", type=_PIXELS, metavar="PX", help="grow the masks by this much (default: 0)")
    add("strengths", type=numbers, action="extend", metavar="S,S", help="for trade-off curves")
    add("num-curve-examples", type=_COUNT, metavar="N", help="take only the first of each group for the curves")
    add(
        "metrics",
        type=words,
        action="extend",
        metavar="NAMES",
        help="joined by commas (default: all that are possible)",
    )
    add(
        "networks",
        type=networks,
        action="extend",
        metavar="PART=NAME",
        help="of the metrics, joined by commas: PART is clip, fid, lpips or dino; NAME is a Hub id, a folder, or, for"
        " clip and fid, `mini`, as in clip=mini; given again, it adds to what was given",
    )
    add("seed", type=_number(int, "in [0, 2**63)", lambda seed: 0 <= seed < 2**63), metavar="K", help="of the noise")
    add("batch-size", type=_COUNT, metavar="N", help="pictures that are edited together (default: 8)")
    add("dtype", choices=("float32", "float16", "bfloat16"), help="of the models (default: float32)")
    evaluate.set_defaults(run=_evaluate)


def _add_demo(commands: Any, parents: list[argparse.ArgumentParser]):
    demo = commands.add_parser(
        "demo",
        parents=parents,
        help="serve a page to edit pictures on",
        description="Serve a page to edit pictures on, until Ctrl-C. It prints its address.",
    )
    demo.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (default: %(default)s)")
    demo.add_argument(
        "--port",
        type=_number(int, "in [1, 65535]", lambda port: 1 <= port <= 65535),
        metavar="N",
        help="to listen at (default: the first free one from 7860)",
    )
    demo.add_argument("--share", action="store_true", help="let gradio make a public address for the page")
    demo.add_argument(
        "--max-megapixels",
        type=_number(float, "above 0", lambda size: 0 < size < math.inf),
        default=40,
        metavar="N",
        help="refuse larger pictures, before they are decoded (default: %(default)s)",
    )
    _add_vae(demo)
    demo.set_defaults(run=_demo)


class _JobParser(_Parser):
    """Reads what the jobs of `batch` say, as if their keys were options."""

    def error(self, message: str):
        raise UserError(message)


def _job_parser() -> _JobParser:
    # With abbreviations, a slip would be taken for another key.
    parser = _JobParser(add_help=False, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", type=Path, required=True)
    _add_mask_settings(parser)
    _add_edit_settings(parser)
    return parser


def _add_mask_settings(parser: argparse.ArgumentParser):
    """What `edit`, `mask`, `batch` and its jobs can be told of masks."""
    parser.add_argument(
        "--mask-threshold",
        type=_number(float, "in [0, 1)", lambda p: 0 <= p < 1),
        metavar="P",
        help="probability above which a pixel belongs to a predicted mask (default: 0.5)",
    )
    parser.add_argument("--mask-dilation", type=_PIXELS, metavar="PX", help="grow the mask by this much (default: 0)")
    parser.add_argument(
        "--mask-feather", type=_PIXELS, metavar="PX", help="let the mask fade in over this much (default: 0)"
    )


def _add_edit_settings(parser: argparse.ArgumentParser):
    """What `edit`, `batch` and its jobs can be told of an edit, besides what it is an edit of."""
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--mask", type=Path, metavar="FILE", help="edit where this picture is white")
    _add_mask_prompts(where)
    parser.add_argument(
        "--strength",
        type=_STRENGTH,
        metavar="S",
        help="how far to go from the source, in models that start from it; those that are shown it beside noise, as"
        " Flux Kontext is, have none (default: 0.7)",
    )
    parser.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=_COUNT,
        metavar="N",
        help="denoising steps at strength 1 (default: 50); --num-inference-steps is the same. Of this and"
        " --guidance-scale, other models than Stable Diffusion have defaults of their own",
    )
    parser.add_argument(
        "--guidance-scale",
        type=_FINITE,
        metavar="G",
        help="how closely to follow the prompt (default: 7.5)",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="a scheduler that needs few steps, fewer steps (12) and less guidance (3), where nothing else is given;"
        " with Stable Diffusion 1.x, 2.x, XL, 3 and Kolors. Others, and models that are made for few steps or without"
        " guidance (turbo, LCM, Flux ...), stay as they are",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    parser.add_argument(
        "--seed",
        type=_number(int, "in [0, 2**63)", lambda seed: 0 <= seed < 2**63),
        metavar="K",
        help="for the same result again (default: a random one; of a job, its line's number)",
    )
    where_to = parser.add_mutually_exclusive_group()
    where_to.add_argument(
        "--crop-padding",
        dest="padding_mask_crop",
        type=_PIXELS,
        metavar="PX",
        help="edit only the mask's surroundings, with so many pixels of context, at the model's size (default: in a"
        " picture larger than the model's, a quarter of the mask's longer side, where that leaves something out)",
    )
    where_to.add_argument("--whole-frame", action="store_true", help="edit the whole picture, however small the mask")
    parser.add_argument(
        "--processing-resolution",
        type=_number(int, "at least 8", lambda pixels: pixels >= 8),
        metavar="PX",
        help="longer side at which the edit runs; the rest of the picture keeps its own pixels (default: the model's"
        " for the surroundings of a mask, and for a picture more than twice as large; else the picture's)",
    )


def _add_vae(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--vae",
        metavar="NAME",
        default=None,
        help="a Hub id or folder of an AutoencoderTiny that goes with the model: madebyollin/taesd with Stable"
        " Diffusion, taesdxl, taesd3, taef1 with others, `mini` with the small models. It costs a fraction of the"
        " model's own VAE, and is less exact inside the mask (default: the model's own)",
    )


def _add_mask_prompts(group):
    group.add_argument("--mask-prompt", metavar="TERM", help="edit what this term names")
    group.add_argument(
        "--source-prompt",
        metavar="TEXT",
        help="a caption of the picture: edit what the prompt says otherwise; `auto` has the caption written",
    )


def _read_image(path: "Path | Picture") -> Image.Image:
    try:
        return open_image(path) if isinstance(path, Path) else path.read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from error


def _output_paths(path: Path, num_images: int, inputs: tuple[Path, ...]) -> list[Path]:
    """OUT, or OUT-1 ... OUT-N; what would make writing them fail is found before any work is done."""
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder")
        if path.suffix.lower() not in FORMATS:
            raise UserError(f"{path}: the extension has to be one of {', '.join(FORMATS)}")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}")
        if not os.access(path.parent, os.W_OK):
            raise UserError(f"{path}: the folder {path.parent} cannot be written to")
        paths = [path]
        if num_images > 1:
            paths = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, num_images + 1)]
        for numbered in paths:
            if numbered.is_dir():
                raise UserError(f"{numbered}: is a folder")
            for given in inputs:
                if numbered.exists() and given.exists() and numbered.samefile(given):
                    raise UserError(f"{numbered}: is {given}, which is read and would be lost; choose another OUT")
    except OSError as error:
        # A name that is too long, or a folder that may not be looked into.
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return paths


def _check_fits(image: Image.Image, path: Path):
    """A result is as large as the picture; that OUT cannot hold it is found before any work is done."""
    image_format, _ = FORMATS[path.suffix.lower()]
    longest = LONGEST_SIDE.get(image_format)
    if longest is not None and max(image.size) > longest:
        raise UserError(
            f"{path}: {image_format} takes at most {longest} pixels a side, and the picture has {image.width}x"
            f"{image.height}; choose another extension"
        )


def _save(image: Image.Image, path: Path):
    """Write a whole file or none: pixels, and of the source's metadata the colour profile and the DPI alone."""
    image_format, options = FORMATS[path.suffix.lower()]
    options = options | {name: image.info[name] for name in ("icc_profile", "dpi") if name in image.info}
    if image_format == "JPEG" and image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    # Without OUT's own name, which may leave no room for more.
    part = path.with_name(f".iedit-{platform.node()}-{os.getpid()}.part")
    try:
        image.save(part, format=image_format, **options)
        # Or a machine that loses its power would keep the name without the content.
        with part.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _model_errors():
    """Make user errors of those with which `loading` and `editor` say what is wrong with a model."""
    from .loading import HubError

    try:
        yield
    except HubError as error:
        raise UserError(f"{error}; `--model mini` needs no download") from error
    # Of the editor: a scheduler that cannot be masked, or an argument that a pipeline does not have.
    except (ValueError, TypeError) as error:
        raise UserError(error) from error


def _check_model(name: str, option: str = "--model"):
    """What can be told of a pipeline's name without importing a library."""
    from .loading import find_pipeline

    with _model_errors():
        find_pipeline(name, option)


def _check_vae(name: str | None):
    from .loading import find

    if name is not None:
        with _model_errors():
            find(name, "--vae", ("mini",))


@functools.cache
def _import_libraries():
    """Import what an edit needs, quickly and without what is no news to a user of the command."""
    # The imports leave a million objects that stay. Searching them for garbage, over and over and once more on the way
    # out, would take a third of a short run's time.
    gc.disable()
    # OpenMP reads it when PyTorch loads it. Threads that spin while they wait for each other take a busy machine's
    # cores from those they wait for: there, an edit of a small model took more than ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import diffusers.utils.logging
    import transformers.utils.logging

    from . import mini, pipeline  # noqa: F401

    gc.freeze()
    gc.enable()
    # The bars of loading from disk, not those of downloads and of denoising.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _choose_device(device: str | None, dtype: str, of_transformer: bool) -> "tuple[str, torch.dtype]":
    """The device, that of `--device` or the best there is, and the precision, that of `--dtype` or the fastest."""
    import torch

    from .acceleration import devices, fast_dtype

    device = device or devices()[0]
    if device not in devices():
        raise UserError(f"--device {device}: PyTorch finds no such device here")
    if dtype == "float16" and device == "cpu":
        raise UserError("--dtype float16: on the CPU, PyTorch lacks operations in it; take float32 or bfloat16")
    return device, fast_dtype(device, of_transformer) if dtype == "auto" else getattr(torch, dtype)


def _load_pipeline(
    name: str,
    device: str | None,
    dtype_name: str,
    edits: bool,
    finds_mask: bool,
    captions: bool,
    arguments: dict[str, Any],
    vae: str | None = None,
) -> "IEditPipeline | LocalEditor":
    """The pipeline of `--model`, as far as the run needs it, and what it lacks to find a mask.

    `arguments` are those of the edit that only some pipelines take: found out before anything is loaded.
    """
    from .loading import load, load_finder, load_pipeline, read_index

    with _model_errors():
        index = read_index(name, "--model")
    _import_libraries()
    from .pipeline import IEditPipeline

    cls: type[DiffusionPipeline] = IEditPipeline
    if index["_class_name"] not in STABLE_DIFFUSION:
        from diffusers import StableDiffusionImg2ImgPipeline

        from .editor import check_arguments, class_for_prompts

        with _model_errors():
            cls = class_for_prompts(index, f"--model {name!r}")
            check_arguments(cls, arguments)
            own = inspect.signature(cls.__call__).parameters.get(TRUE_GUIDANCE)
            if "negative_prompt" in arguments and own is not None and own.default <= 1:
                raise ValueError(
                    f"--negative-prompt: of {cls.__name__} it changes nothing without `{TRUE_GUIDANCE}`, which the"
                    " command does not have; `LocalEditor` takes both"
                )
        cls = IEditPipeline if cls is StableDiffusionImg2ImgPipeline else cls
    of_transformer = "transformer" in inspect.signature(cls.__init__).parameters
    device, dtype = _choose_device(device, dtype_name, of_transformer)

    left_out: dict[str, Any] = {} if edits else {"requires_safety_checker": False}
    for needed, components in ((edits, EDITING), (finds_mask, MASKING), (captions, CAPTIONING)):
        if not needed:
            left_out |= dict.fromkeys(components)
    given: dict[str, Any] = {}
    pipe: Any
    with _model_errors():
        if vae is not None:
            from diffusers import AutoencoderTiny

            from . import mini

            given["vae"] = load(AutoencoderTiny, vae, "--vae", mini.tiny_vae_path(), dtype=dtype)
        if cls is IEditPipeline:
            kind = "Stable Diffusion 1.x or 2.x"
            pipe = load_pipeline(IEditPipeline, name, "--model", kind, dtype=dtype, **left_out | given)
        elif edits:
            from .editor import LocalEditor

            pipe = LocalEditor(load_pipeline(cls, name, "--model", dtype=dtype, **given))
            if vae is not None:
                _check_channels(pipe.pipe, vae)
        else:
            pipe = IEditPipeline(**dict.fromkeys(EDITING), requires_safety_checker=False)
        for part, needed in (("mask_model", finds_mask), ("captioner", captions)):
            if needed and getattr(pipe, part) is None:
                # mypy sees two strings.
                finder = load_finder(part, name, index, "--model", dtype)  # type: ignore[arg-type]
                for found, component in finder.items():
                    setattr(pipe, found, component)
    from .acceleration import prepare

    with _pipeline_errors(pipe):
        return prepare(pipe, device, dtype)


def _check_channels(pipe: "DiffusionPipeline", vae: str):
    """That `--vae` makes the latents of another model would show as an error of shapes. `IEditPipeline` says it."""
    denoiser: Any = getattr(pipe, "unet", None) or pipe.transformer
    channels = pipe.vae.config.latent_channels
    # Transformers that take packed latents see 2 x 2 cells as one.
    if denoiser.config.in_channels not in (channels, 4 * channels):
        raise ValueError(
            f"--vae {vae!r} makes latents of {channels} channels, and the model takes {denoiser.config.in_channels}"
        )


@contextlib.contextmanager
def _notes():
    """The package's notes, such as which term is looked for, go to stderr, and not its warnings alone."""
    log, handler = logging.getLogger(__package__), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(logging.NOTSET)
        log.removeHandler(handler)


@contextlib.contextmanager
def _pipeline_errors(pipe: "IEditPipeline | LocalEditor"):
    """Make user errors of the `ValueError`s with which pipeline and scheduler refuse arguments, of what a device
    lacks, memory or precision, and of what fails inside of diffusers; of no others.
    """
    import torch

    try:
        yield
    except FloatingPointError as error:
        hint = " `--dtype bfloat16` and `--dtype float32` have room for it." if pipe.dtype == torch.float16 else ""
        raise UserError(f"{error}{hint}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has too little memory: take a smaller --processing-resolution, fewer --num-images or --device cpu"
        ) from error
    except Exception as error:
        modules = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
        # Where PyTorch or Transformers fail, it is for their caller.
        *_, module = [name for name in modules if name.partition(".")[0] not in ("torch", "transformers")]
        package = module.partition(".")[0]
        if isinstance(error, ValueError) and package in ("diffusers", __package__):
            raise UserError(str(error)) from error
        if package == "diffusers":
            # Some arguments pass all checks and fail on the way, as the noise of a time step after the last.
            raise UserError(f"{module} fails: {_in_one_line(error)}") from error
        raise


def _read_notes(path: Path, image: Image.Image, output: Path) -> list[str]:
    """What of a picture does not reach its edit, or is not the same there, for the printed line."""
    notes = []
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        notes.append(f"the first of {frames} frames")
    if image.mode.startswith(("I", "F")) or _is_16_bit(path):
        notes.append("reduced to 8 bits")
    # Greys stay what they are, but not by way of a profile.
    if image.mode in ("CMYK", "LAB", "HSV", "YCbCr") or (image.mode in ("L", "LA") and "icc_profile" in image.info):
        notes.append(f"converted from {image.mode} to RGB")
    image_format = FORMATS[output.suffix.lower()][0]
    if image.has_transparency_data and image_format in ("JPEG", "BMP"):
        notes.append(f"{image_format} keeps no transparency (PNG does)")
    if image_format in LOSSY:
        notes.append(f"{image_format} compresses what was not edited anew (PNG keeps every byte)")
    if image_format == "BMP" and "icc_profile" in image.info:
        notes.append("BMP keeps no colour profile (PNG does)")
    return notes


def _is_16_bit(path: Path) -> bool:
    """Whether a file has colours of 16 bits, of which Pillow gives 8."""
    with Image.open(path) as unread:
        return any("16" in str(tile.args) for tile in unread.tile if isinstance(tile.args, (str, tuple)))


def _settle_region(pipe: "IEditPipeline | LocalEditor", photo: "Photo", given: dict, whole_frame: bool) -> list[str]:
    """Settle what of the picture is edited at which size, as `--help` says, in the arguments of the edit.

    Words are replaced by the mask that they find, as its size decides. Returns what was done, for the printed line.
    """
    from .masking_iedit import dilate
    from .regions_iedit import automatic_padding, read_masks, surrounding_region

    if any(name in given for name in WHERE):
        words = {name: given.pop(name) for name in (*WHERE, "mask_threshold") if name in given}
        given["mask_image"] = pipe.predict_mask(photo, given["prompt"], **words)[0]
    resolution = given.get("processing_resolution", pipe.native_resolution)
    if "mask_image" in given and not whole_frame:
        mask = dilate(read_masks(given["mask_image"], 1, photo.size), given.get("mask_dilation", 0))[0]
        padding = given.get("padding_mask_crop", automatic_padding(mask, pipe.native_resolution))
        if padding is not None:
            given["padding_mask_crop"] = padding
            region = surrounding_region(mask, padding)
            return [f"the {region.width}x{region.height} px around the mask edited at {resolution} px"]
    settled = pipe.settled_resolution(photo.size) if hasattr(pipe, "settled_resolution") else None
    if "processing_resolution" not in given and (settled or max(photo.size) > 2 * resolution):
        given["processing_resolution"] = settled or resolution
        return [f"processed at {given['processing_resolution']} px"]
    return []


def _check_padding(options: Iterable[str]):
    if "padding_mask_crop" in options and not {"mask", *WHERE} & {*options}:
        raise UserError("--crop-padding needs a mask: pass --mask, --mask-prompt or --source-prompt too")


def _read_edit(args: argparse.Namespace) -> tuple[Image.Image, dict[str, Any]]:
    """The picture, and what of the options goes to the pipeline."""
    image = _read_image(args.image)
    _check_fits(image, args.output)
    _check_padding(vars(args))
    given = {name: getattr(args, name) for name in EDIT_ARGUMENTS if hasattr(args, name)}
    if hasattr(args, "mask"):
        given["mask_image"] = _read_image(args.mask)
    return image, given


def _settle(
    pipe: "IEditPipeline | LocalEditor", image: "Image.Image | Photo", given: dict[str, Any], whole_frame: bool
) -> "tuple[Photo, list[str]]":
    """Settle the arguments of the edit. Returns the picture as the pipeline takes it, and as `_settle_region`."""
    from .pipeline import IEditPipeline
    from .regions_iedit import read_photos

    ours, theirs = (
        inspect.signature(cls.__call__).parameters for cls in (IEditPipeline, type(getattr(pipe, "pipe", pipe)))
    )
    if "strength" in theirs:
        given.setdefault("strength", ours["strength"].default)
    if TRUE_GUIDANCE in theirs and theirs[TRUE_GUIDANCE].default > 1:
        # Qwen-Image's is by this name, and only on with a negative prompt; a blank one is its authors' default.
        given.setdefault("negative_prompt", " ")
        if "guidance_scale" in given:
            given[TRUE_GUIDANCE] = given.pop("guidance_scale")
    with _pipeline_errors(pipe):
        # Once, so that what its profile lacks is said once.
        (photo,) = read_photos(image)
        return photo, _settle_region(pipe, photo, given, whole_frame)


def _make_results(
    pipe: "IEditPipeline | LocalEditor", photo: "Photo", given: dict[str, Any], seeds: Sequence[int]
) -> "IEditPipelineOutput":
    """The results of an edit with settled arguments, one a seed."""
    import torch

    # Drawn on the CPU, a seed gives the same noise on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _pipeline_errors(pipe):
        return pipe(image=photo, num_images_per_prompt=len(seeds), generator=generators, **given)


def _edit(args: argparse.Namespace) -> tuple[str, str]:
    """Edit and save. Returns what the printed line says before and after the seconds."""
    inputs = (args.image, args.mask) if hasattr(args, "mask") else (args.image,)
    paths = _output_paths(args.output, args.num_images, inputs)
    image, given = _read_edit(args)
    _check_model(args.model)
    _check_vae(args.vae)

    notes = _read_notes(args.image, image, paths[0])
    pipe = _load_pipeline(
        args.model,
        args.device,
        args.dtype,
        edits=True,
        finds_mask="mask_prompt" in given or "source_prompt" in given,
        captions=given.get("source_prompt") == "auto",
        arguments={name: given[name] for name in PIPELINE_ARGUMENTS if name in given},
        vae=args.vae,
    )
    if hasattr(args, "fast"):
        from .acceleration import few_steps

        pipe, settings = few_steps(pipe)
        given = settings | given
        if not settings:
            notes.append(f"--fast changes nothing of a {type(getattr(pipe, 'pipe', pipe)).__name__}")
    with _notes():
        photo, notes[:0] = _settle(pipe, image, given, whole_frame=hasattr(args, "whole_frame"))
    first_seed = args.seed if hasattr(args, "seed") else secrets.randbelow(2**32)
    seeds = range(first_seed, first_seed + args.num_images)
    with _notes():
        output = _make_results(pipe, photo, given, seeds)
    for result, path in zip(output.images, paths, strict=True):
        _save(result, path)
    note = "".join(f", {note}" for note in notes)
    if args.num_images == 1:
        return str(paths[0]), f", seed {seeds[0]}{note}"
    return f"{paths[0]} to {paths[-1].name}", f", seeds {seeds[0]} to {seeds[-1]}{note}"


def _mask(args: argparse.Namespace) -> tuple[str, str]:
    """Predict a mask and save it. Returns as `_edit` does."""
    if hasattr(args, "source_prompt") != hasattr(args, "prompt"):
        raise UserError("--source-prompt and --prompt belong together: the words that differ are looked for")
    (path,) = _output_paths(args.output, 1, (args.image,))
    image = _read_image(args.image)
    _check_fits(image, args.output)
    _check_model(args.model)
    given = {name: getattr(args, name) for name in MASK_ARGUMENTS if hasattr(args, name)}

    captions = given.get("source_prompt") == "auto"
    pipe = _load_pipeline(
        args.model, args.device, args.dtype, edits=False, finds_mask=True, captions=captions, arguments={}
    )
    with _notes(), _pipeline_errors(pipe):
        (mask,) = pipe.predict_mask(image, **given)
    _save(mask, path)
    return str(path), ""


@dataclasses.dataclass
class _JobEditor:
    """Edits jobs of `batch` with a model that it loads when the first come; until then it can be pickled."""

    model: str
    vae: str | None
    device: str | None
    dtype: str
    finds_mask: bool
    captions: bool
    arguments: dict[str, Any]

    @functools.cached_property
    def pipe(self) -> "IEditPipeline | LocalEditor":
        pipe = _load_pipeline(
            self.model, self.device, self.dtype, True, self.finds_mask, self.captions, self.arguments, self.vae
        )
        denoiser: Any = getattr(pipe, "pipe", pipe)
        denoiser.set_progress_bar_config(disable=True)
        return pipe

    def load(self) -> None:
        self.pipe  # noqa: B018

    def __call__(self, jobs: list[dict[str, Any]]) -> list[str | None]:
        """Edits jobs of one kind and saves the results; returns why each failed, or None."""
        from .acceleration import few_steps

        errors: list[str | None] = [None] * len(jobs)
        pipe, settings = few_steps(self.pipe) if "fast" in jobs[0] else (self.pipe, {})
        alike: dict[tuple, list[tuple[int, Photo, dict]]] = {}
        for number, job in enumerate(jobs):
            try:
                image, given = _read_edit(argparse.Namespace(**job))
                given = settings | given
                photo, _ = _settle(pipe, image, given, whole_frame="whole_frame" in job)
            # A job may fail in any way: that is a result too, and the others go on.
            except Exception as error:
                errors[number] = _in_one_line(error)
                continue
            shared = [(name, value) for name, value in given.items() if name not in ("prompt", "mask_image")]
            alike.setdefault((photo.size, "mask_image" in given, *shared), []).append((number, photo, given))
        for chosen in alike.values():
            seeds = [jobs[number]["seed"] for number, *_ in chosen]
            edited = self._edit(pipe, [(photo, given) for _, photo, given in chosen], seeds)
            for (number, *_), result in zip(chosen, edited, strict=True):
                errors[number] = result if isinstance(result, str) else _save_job(result, jobs[number]["output"])
        return errors

    def _edit(
        self, pipe: "IEditPipeline | LocalEditor", edits: "list[tuple[Photo, dict]]", seeds: list[int]
    ) -> Sequence[Image.Image | str]:
        """The results of edits that share all settings, or why there is none."""
        import torch

        _, given = edits[0]
        own = {name: [given[name] for _, given in edits] for name in ("prompt", "mask_image") if name in given}
        photos, generators = [photo for photo, _ in edits], [torch.Generator().manual_seed(seed) for seed in seeds]
        try:
            with _pipeline_errors(pipe):
                return pipe(image=photos, generator=generators, **given | own).images
        except Exception as error:
            failure = _in_one_line(error)
        if len(edits) == 1:
            return [failure]
        # It may be the fault of one, or all may not fit the memory.
        return [self._edit(pipe, [edit], [seed])[0] for edit, seed in zip(edits, seeds, strict=True)]


def _in_one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError) else f"{type(error).__name__}: {message}"


def _save_job(image: Image.Image, path: Path) -> str | None:
    """Saves a result; returns why it cannot be, unless that is a disk on which nothing else could be saved either."""
    from .batch import DISK_FULL

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _save(image, path)
    except (UserError, OSError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        return _in_one_line(error)
    return None


def _parse_job(parser: _JobParser, defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The options of a job, as `edit` has them, with the command's where the job says nothing."""
    for key, value in values.items():
        if not isinstance(value, (str, int, float)):
            raise UserError(f"{key!r} has to be a text, a number or true, but is {value!r:.40}")
    # What is false is not to be done, though the command's own options ask for it.
    off = {key.replace("-", "_") for key, value in values.items() if value is False}
    defaults = {name: value for name, value in defaults.items() if name not in off}
    argv = [f"--{key}" if value is True else f"--{key}={value}" for key, value in values.items() if value is not False]
    read, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].removeprefix("--").partition("=")[0]
        raise UserError(f"unknown key {next((key for key in values if key.replace('_', '-') == name), name)!r}")
    given = vars(read)
    if given["output"].suffix.lower() not in FORMATS:
        raise UserError(f"output {str(given['output'])!r} has to end in one of {', '.join(FORMATS)}")
    # Of what excludes each other, the job's is meant.
    for names in (("mask", *WHERE), ("padding_mask_crop", "whole_frame")):
        if any(name in given for name in names):
            defaults = {name: value for name, value in defaults.items() if name not in names}
    options = defaults | given
    _check_padding(options)
    return options


def _batch(args: argparse.Namespace) -> tuple[str, str] | None:
    """Edit what a file asks for. Returns as `_edit` does, in the main process."""
    with _stoppable(args.command):
        return _edit_jobs(args)


def _edit_jobs(args: argparse.Namespace) -> tuple[str, str] | None:
    from . import batch

    _check_model(args.model)
    _check_vae(args.vae)
    settings = ("mask", "seed", "whole_frame", "fast", *EDIT_ARGUMENTS)
    defaults = {name: getattr(args, name) for name in settings if hasattr(args, name)}
    if "mask" in defaults:
        defaults["mask"] = defaults["mask"].absolute()
        # Once, and not for each job.
        _read_image(defaults["mask"])
    try:
        parse = functools.partial(_parse_job, _job_parser(), defaults)
        source = batch.open_source(args.jobs, args.split)
        jobs = batch.read_jobs(source, args.output_dir, parse, args.any_output)
    except OSError as error:
        raise UserError(f"{args.jobs}: cannot be read ({error.strerror or error})") from error
    except (ValueError, ImportError) as error:
        raise UserError(error) from error

    config = {"jobs": source.fingerprint, "model": args.model, "dtype": args.dtype, "vae": args.vae}
    config |= {name: str(value) for name, value in defaults.items()}
    asked = [job.options for job in jobs]
    edit = _JobEditor(
        args.model,
        args.vae,
        args.device,
        args.dtype,
        finds_mask=any(name in options for options in asked for name in WHERE),
        captions=any(options.get("source_prompt") == "auto" for options in asked),
        arguments={name: options[name] for options in asked for name in PIPELINE_ARGUMENTS if name in options},
    )
    from tqdm.contrib.logging import logging_redirect_tqdm

    from .engines import make_engine

    try:
        engine = make_engine(args.engine, args.ray_address, args.num_workers, args.gpus_per_worker)
        loggers = [logging.getLogger(name) for name in (None, "diffusers", "transformers")]
        with logging_redirect_tqdm(loggers):
            rows = batch.run(jobs, edit, args.output_dir, config, engine, args.batch_size, args.retry_failed)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(error) from error
    except OSError as error:
        raise UserError(f"{error}. {GOES_ON}") from error
    if not engine.is_main:
        return None
    if failed := [row for row in rows if "error" in row]:
        listed = "; ".join(f"{source.line} {row['job']}: {row['error']}" for row in failed[:3])
        raise FailedEditsError(
            f"{len(failed)} of {len(rows)} edits failed, see {args.output_dir / 'results.jsonl'}; --retry-failed tries"
            f" them again: {listed}"
        )
    return str(args.output_dir / "results.jsonl"), f", {len(rows)} edits"


@contextlib.contextmanager
def _stoppable(command: str):
    """SIGTERM and Ctrl-C end the process at once, with a line, whatever it is in the middle of.

    Only for work that a kill at any moment does not harm. A handler in Python would have to wait until a library comes
    back, which one that waits for another process may never do.
    """
    names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch():
        while number := os.read(read, 1):
            if name := names.get(number[0]):
                try:
                    # Of several processes, one says it.
                    if os.environ.get("RANK", "0") == "0":
                        os.write(2, f"\niedit {command}: stopped by {name}. {GOES_ON}\n".encode())
                # Who was to read it may have been stopped as well.
                finally:
                    os._exit(128 + number[0])
        os.close(read)

    threading.Thread(target=watch, daemon=True).start()
    handlers = {number: signal.signal(number, lambda *_: None) for number in names}
    woken = signal.set_wakeup_fd(write)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write)


def _evaluate(args: argparse.Namespace) -> tuple[str, str] | None:
    """Evaluate methods. Returns as `_edit` does, in the main process."""
    with _stoppable(args.command):
        return _evaluate_methods(args)


def _evaluate_methods(args: argparse.Namespace) -> tuple[str, str] | None:
    for name in ("model", "base_model", "instruct_model"):
        if hasattr(args, name):
            _check_model(getattr(args, name), f"--{name.replace('_', '-')}")
    _import_libraries()
    try:
        import torch
        from tqdm.contrib.logging import logging_redirect_tqdm

        from .evaluation.methods import Settings
        from .evaluation.runner import evaluate
    except ImportError as error:
        raise UserError(f'{error}: pip install "diffusers-iedit[eval]"') from error

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = {name: given.pop(name) for name in names & given.keys()}
    given.setdefault("methods", ["sdedit", "sdedit-m", "iedit", "iedit-m"])
    given["networks"] = dict(given["networks"]) if "networks" in given else None
    if "dtype" in given:
        given["dtype"] = getattr(torch, args.dtype)
    # A line that is logged stands above the bars, not in them.
    loggers = [logging.getLogger(name) for name in (None, "diffusers", "transformers")]
    try:
        with logging_redirect_tqdm(loggers):
            results = evaluate(settings=Settings(**settings), **given)
    except (ValueError, OSError) as error:
        raise UserError(error) from error
    except Exception as error:
        frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
        if isinstance(error, RuntimeError) and frame.f_globals["__name__"].startswith(f"{__package__}."):
            raise UserError(error) from error
        # Nobody saw it coming. What was done is kept, and a line tells a user more than the frames of five libraries.
        where = f"{Path(frame.f_code.co_filename).name}, line {line}"
        raise UserError(f"{type(error).__name__}: {error} ({where}). {GOES_ON}") from error
    failed = [
        f"{example['key']} by {variant}"
        for example in results.get("examples", ())
        for variant, found in example["results"].items()
        if "error" in found
    ]
    if failed:
        raise FailedEditsError(
            f"{len(failed)} edits failed, see {args.output_dir / 'results.md'}: {', '.join(failed[:3])}"
        )
    # Of several processes, one has the results, and says so.
    return (str(args.output_dir / "index.html"), ", the page with the edits, plots and tables") if results else None


def _demo(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    _check_model(args.model)
    _check_vae(args.vae)
    _import_libraries()
    from .demo import serve

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    serve(**given)


def main(argv: list[str] | None = None) -> int:
    """Run `iedit` with `argv` (default: the process's).

    Returns the exit code: 0 done, 1 done but for some edits that failed, 2 the user's mistake.
    """
    start = time.perf_counter()
    args = build_parser().parse_args(argv)
    try:
        done = args.run(args)
    except (UserError, FailedEditsError) as error:
        message = " ".join(str(error).split())
        print(f"iedit {args.command}: error: {message}", file=sys.stderr)
        return 1 if isinstance(error, FailedEditsError) else 2
    except KeyboardInterrupt:
        print(f"iedit {args.command}: interrupted", file=sys.stderr)
        return 130
    if done is not None:
        where, details = done
        print(f"{where}: {time.perf_counter() - start:.1f} s{details}")
    return 0


if __name__ == "__main__":
    # By their own name: in other processes, which are sent what is to be done, `__main__` is something else.
    from diffusers_iedit import cli

    sys.exit(cli.main())
