"""The `iedit` command: reads files and arguments, hands them to `IEditPipeline`, writes what comes back."""

import argparse
import contextlib
import dataclasses
import functools
import gc
import math
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image


if TYPE_CHECKING:
    from .pipeline import IEditPipeline


DEFAULT_MODEL = "CompVis/stable-diffusion-v1-4"
MASK_MODEL = "CIDAS/clipseg-rd64-refined"
CAPTIONER = "Salesforce/blip-image-captioning-large"

# What each extension is written as. WebP is asked to be lossless, as the background is meant to stay exact.
FORMATS = {
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
    ".bmp": ("BMP", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
}

# Arguments that go to the pipeline under their own name, so that its defaults are the only ones.
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
    "processing_resolution",
)
MASK_ARGUMENTS = ("prompt", "mask_prompt", "source_prompt", "mask_threshold", "mask_dilation", "mask_feather")

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


class UserError(Exception):
    """A mistake of the user's: `main` prints its message as one line and exits with 2."""


class FailedEditsError(Exception):
    """Some edits of an evaluation failed, and all others are there: `main` prints its message and exits with 1."""


class _Parser(argparse.ArgumentParser):
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
_PIXELS = _number(int, "at least 0", lambda pixels: pixels >= 0)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="iedit", description="Change one thing in a picture and keep the rest.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{edit,mask,evaluate}")

    # Options left out are left out of the namespace too, which leaves their defaults to the pipeline.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("image", type=Path, metavar="IMAGE", help="the picture")
    common.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        required=True,
        help=f"where to write the result; the format follows the extension ({', '.join(FORMATS)})",
    )
    common.add_argument(
        "--model",
        metavar="NAME",
        default=DEFAULT_MODEL,
        help="a Hub id, a folder, or `mini` for the small models of the package (default: %(default)s)",
    )
    common.add_argument(
        "--mask-threshold",
        type=_number(float, "in [0, 1)", lambda p: 0 <= p < 1),
        metavar="P",
        help="probability above which a pixel belongs to a predicted mask (default: 0.5)",
    )
    common.add_argument("--mask-dilation", type=_PIXELS, metavar="PX", help="grow the mask by this much (default: 0)")
    common.add_argument(
        "--mask-feather", type=_PIXELS, metavar="PX", help="let the mask fade in over this much (default: 0)"
    )

    edit = commands.add_parser(
        "edit", parents=[common], argument_default=argparse.SUPPRESS, help="edit a picture towards a prompt"
    )
    edit.add_argument("prompt", metavar="PROMPT", help="what the picture shows after the edit")
    where = edit.add_mutually_exclusive_group()
    where.add_argument("--mask", type=Path, metavar="FILE", help="edit where this picture is white")
    _add_mask_prompts(where)
    edit.add_argument(
        "--strength",
        type=_STRENGTH,
        metavar="S",
        help="how far to go from the source (default: 0.7)",
    )
    edit.add_argument(
        "--steps",
        dest="num_inference_steps",
        type=_COUNT,
        metavar="N",
        help="denoising steps at strength 1 (default: 50)",
    )
    edit.add_argument(
        "--guidance-scale",
        type=_number(float, "a finite number", math.isfinite),
        metavar="G",
        help="how closely to follow the prompt (default: 7.5)",
    )
    edit.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
    edit.add_argument(
        "--seed",
        type=_number(int, "in [0, 2**63)", lambda seed: 0 <= seed < 2**63),
        metavar="K",
        help="for the same result again (default: a random one)",
    )
    edit.add_argument(
        "--num-images",
        type=_COUNT,
        default=1,
        metavar="N",
        help="N results OUT-1 ... OUT-N, which have the seeds K ... K+N-1 (default: %(default)s)",
    )
    edit.add_argument(
        "--processing-resolution",
        type=_number(int, "at least 8", lambda pixels: pixels >= 8),
        metavar="PX",
        help="longer side at which the edit runs; the rest of the picture keeps its own pixels (default: the"
        " picture's, or the model's if the picture is more than twice as large)",
    )
    edit.set_defaults(run=_edit)

    mask = commands.add_parser(
        "mask", parents=[common], argument_default=argparse.SUPPRESS, help="write the mask that `edit` would use"
    )
    where = mask.add_mutually_exclusive_group(required=True)
    _add_mask_prompts(where)
    mask.add_argument("--prompt", metavar="TEXT", help="the edit prompt that --source-prompt is compared with")
    mask.set_defaults(run=_mask)

    evaluate = commands.add_parser(
        "evaluate",
        argument_default=argparse.SUPPRESS,
        help="measure how well methods change what was asked and keep the rest",
    )

    def add(name: str, **options):
        # With underscores too, as the training scripts have it.
        evaluate.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}")), **options)

    def words(text: str) -> list[str]:
        return [word for word in text.split(",") if word]

    def numbers(text: str) -> list[float]:
        return [_STRENGTH(word) for word in words(text)]

    def networks(text: str) -> dict[str, str]:
        return dict(word.split("=", 1) for word in words(text))

    add("data", required=True, metavar="SET", help="mini, pie-bench:DIR, or a set of pairs: a folder or a Hub id")
    add("output-dir", required=True, type=Path, metavar="DIR", help="where results.json, results.md, index.html go")
    add("model", default=DEFAULT_MODEL, metavar="NAME", help="the fine-tuned model (default: %(default)s)")
    add("base-model", metavar="NAME", help=f"what it was fine-tuned from (default: {DEFAULT_MODEL}; mini's for mini)")
    add("instruct-model", metavar="NAME", help="an InstructPix2Pix model, for instruct-pix2pix")
    add(
        "methods",
        type=words,
        default=words("sdedit,sdedit-m,iedit,iedit-m"),
        metavar="NAMES",
        help="joined by commas: sdedit, sdedit-m, sdedit-given, iedit, iedit-m, iedit-given, blended, inpaint,"
        " instruct-pix2pix, or module:Class; NAME@SETTING=VALUE changes a setting for one of them; differences are"
        " taken from the first (default: sdedit,sdedit-m,iedit,iedit-m)",
    )
    add("split", metavar="NAME", help="of the data")
    add("num-examples", type=_COUNT, metavar="N", help="take only the first of each group")
    add("strength", type=_STRENGTH, metavar="S", help="of all methods (default: 0.7)")
    add("guidance-scale", type=float, metavar="G", help="of all methods (default: 7.5)")
    add("steps", dest="num_inference_steps", type=_COUNT, metavar="N", help="at strength 1 (default: 50)")
    add("mask-dilation", type=_PIXELS, metavar="PX", help="grow the masks by this much (default: 0)")
    add("strengths", type=numbers, metavar="S,S", help="for trade-off curves")
    add("num-curve-examples", type=_COUNT, metavar="N", help="take only the first of each group for the curves")
    add("metrics", type=words, metavar="NAMES", help="joined by commas (default: all that are possible)")
    add("networks", type=networks, metavar="PART=NAME", help="of the metrics: clip, fid, lpips, dino")
    add("seed", type=_number(int, "in [0, 2**63)", lambda seed: 0 <= seed < 2**63), metavar="K", help="of the noise")
    add("batch-size", type=_COUNT, metavar="N", help="pictures that are edited together (default: 8)")
    add("dtype", choices=("float32", "float16", "bfloat16"), help="of the models (default: float32)")
    evaluate.set_defaults(run=_evaluate)
    return parser


def _add_mask_prompts(group):
    group.add_argument("--mask-prompt", metavar="TERM", help="edit what this term names")
    group.add_argument(
        "--source-prompt",
        metavar="TEXT",
        help="a caption of the picture: edit what the prompt says otherwise; `auto` has the caption written",
    )


def _read_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # A broken file makes Pillow's decoders raise nearly anything.
    except Exception as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from error
    return image


def _output_paths(path: Path, num_images: int) -> list[Path]:
    """OUT, or OUT-1 ... OUT-N; what would make writing them fail is found before any work is done."""
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
    return paths


def _save(image: Image.Image, path: Path):
    """Write a whole file or none, pixels only: nothing of the source's metadata goes along."""
    image_format, options = FORMATS[path.suffix.lower()]
    if image_format == "JPEG" and image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(part, format=image_format, **options)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)


def _check_model(name: str):
    """What can be told of `--model` without importing a library."""
    if name == "mini" or not os.path.exists(name):
        return
    if not os.path.isfile(os.path.join(name, "model_index.json")):
        raise UserError(f"--model {name}: is no folder of a diffusers pipeline, as it has no model_index.json")


@functools.cache
def _import_libraries():
    """Import what an edit needs, quickly and without what is no news to a user of the command."""
    # The imports leave a million objects that stay. Searching them for garbage, over and over and once more on the way
    # out, would take a third of a short run's time.
    gc.disable()
    import diffusers.utils.logging
    import transformers.utils.logging

    from . import mini, pipeline  # noqa: F401

    gc.freeze()
    gc.enable()
    # The bars of loading from disk, not those of downloads and of denoising.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def _download(name: str, fetch: Callable[[], str]) -> str:
    """The local folder that `fetch` makes of a Hub id."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # The error below says what its warning would.
    try:
        return fetch()
    except HFValidationError:
        raise UserError(f"{name!r} is neither a folder nor a model id") from None
    except (OSError, HTTPError) as error:
        if isinstance(error, RepositoryNotFoundError) or isinstance(error.__cause__, RepositoryNotFoundError):
            reason = "the Hugging Face Hub has no such model, or needs you to log in for it"
        elif isinstance(error, OSError) and error.errno is not None:
            reason = f"the cache cannot be written to ({error.strerror})"
        else:
            reason = "the Hugging Face Hub cannot be reached and the model is not in the cache"
        raise UserError(f"cannot load {name}: {reason}; `--model mini` needs no download") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _reading(name: str):
    """Whatever goes wrong while a model's files are read is the files' fault: the libraries raise nearly anything."""
    try:
        yield
    except Exception as error:
        raise UserError(f"cannot load {name}: {type(error).__name__}: {error}") from error


def _load_pipeline(name: str, edits: bool, finds_mask: bool, captions: bool) -> "IEditPipeline":
    """The pipeline of `--model`, as far as the run needs it, and from the Hub what it lacks to find a mask."""
    _import_libraries()
    import torch

    from . import mini
    from .pipeline import IEditPipeline

    device, dtype = "cpu", torch.float32
    if torch.cuda.is_available():
        device, dtype = "cuda", torch.float16
    elif torch.backends.mps.is_available():
        device = "mps"

    left_out = {} if edits else {"requires_safety_checker": False}
    for needed, components in ((edits, EDITING), (finds_mask, MASKING), (captions, CAPTIONING)):
        if not needed:
            left_out |= dict.fromkeys(components)
    folder = name
    if name == "mini":
        folder = str(mini.model_path())
    elif not os.path.isdir(name):
        folder = _download(name, lambda: IEditPipeline.download(name, **left_out))
    with _reading(name):
        pipe = IEditPipeline.from_pretrained(folder, dtype=dtype, **left_out)
    if finds_mask and pipe.mask_model is None:
        from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

        model, processor = _load_extra(MASK_MODEL, CLIPSegForImageSegmentation, CLIPSegProcessor, dtype)
        pipe.register_modules(mask_model=model, mask_processor=processor)
    if captions and pipe.captioner is None:
        from transformers import BlipForConditionalGeneration, BlipProcessor

        model, processor = _load_extra(CAPTIONER, BlipForConditionalGeneration, BlipProcessor, dtype)
        pipe.register_modules(captioner=model, caption_processor=processor)
    return pipe.to(device)


def _load_extra(name: str, model_class, processor_class, dtype):
    from huggingface_hub import snapshot_download

    # As one snapshot: file by file, transformers tries an unreachable Hub for minutes.
    patterns = ["*.json", "*.txt", "model.safetensors"]
    folder = _download(name, lambda: snapshot_download(name, allow_patterns=patterns))
    with _reading(name):
        return model_class.from_pretrained(folder, dtype=dtype), processor_class.from_pretrained(folder)


@contextlib.contextmanager
def _pipeline_errors():
    """Make user errors of the `ValueError`s with which pipeline and scheduler refuse arguments, and of no others."""
    try:
        yield
    except ValueError as error:
        traceback = error.__traceback__
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback.tb_frame.f_globals["__name__"].partition(".")[0] not in ("diffusers", __package__):
            raise
        raise UserError(str(error)) from error


def _edit(args: argparse.Namespace) -> tuple[str, str]:
    """Edit and save. Returns what the printed line says before and after the seconds."""
    paths = _output_paths(args.output, args.num_images)
    image = _read_image(args.image)
    given = {name: getattr(args, name) for name in EDIT_ARGUMENTS if hasattr(args, name)}
    if hasattr(args, "mask"):
        given["mask_image"] = _read_image(args.mask)
    _check_model(args.model)

    pipe = _load_pipeline(
        args.model,
        edits=True,
        finds_mask="mask_prompt" in given or "source_prompt" in given,
        captions=given.get("source_prompt") == "auto",
    )
    import torch

    native_resolution = pipe.unet.config.sample_size * pipe.vae_scale_factor
    note = ""
    if "processing_resolution" not in given and max(image.size) > 2 * native_resolution:
        given["processing_resolution"] = native_resolution
        note = f", processed at {native_resolution} px"
    first_seed = args.seed if hasattr(args, "seed") else secrets.randbelow(2**32)
    seeds = range(first_seed, first_seed + args.num_images)
    # Drawn on the CPU, a seed gives the same noise on every device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with _pipeline_errors():
        output = pipe(image=image, num_images_per_prompt=args.num_images, generator=generators, **given)
    for result, path in zip(output.images, paths, strict=True):
        _save(result, path)
    if args.num_images == 1:
        return str(paths[0]), f", seed {seeds[0]}{note}"
    return f"{paths[0]} to {paths[-1].name}", f", seeds {seeds[0]} to {seeds[-1]}{note}"


def _mask(args: argparse.Namespace) -> tuple[str, str]:
    """Predict a mask and save it. Returns as `_edit` does."""
    if hasattr(args, "source_prompt") != hasattr(args, "prompt"):
        raise UserError("--source-prompt and --prompt belong together: the words that differ are looked for")
    (path,) = _output_paths(args.output, 1)
    image = _read_image(args.image)
    _check_model(args.model)
    given = {name: getattr(args, name) for name in MASK_ARGUMENTS if hasattr(args, name)}

    captions = given.get("source_prompt") == "auto"
    pipe = _load_pipeline(args.model, edits=False, finds_mask=True, captions=captions)
    with _pipeline_errors():
        (mask,) = pipe.predict_mask(image, **given)
    _save(mask, path)
    return str(path), ""


def _evaluate(args: argparse.Namespace) -> tuple[str, str]:
    """Evaluate methods. Returns as `_edit` does."""
    _import_libraries()
    try:
        import torch

        from .evaluation.methods import Settings
        from .evaluation.runner import evaluate
    except ImportError as error:
        raise UserError(f'{error}: pip install "diffusers-iedit[eval]"') from error

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    names = {field.name for field in dataclasses.fields(Settings)}
    settings = {name: given.pop(name) for name in names & given.keys()}
    settings.setdefault("base_model", "mini-base" if args.model == "mini" else DEFAULT_MODEL)
    if "dtype" in given:
        given["dtype"] = getattr(torch, args.dtype)
    try:
        results = evaluate(settings=Settings(**settings), **given)
    except (ValueError, OSError) as error:
        raise UserError(error) from error
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
    return str(args.output_dir / "index.html"), ""


def main(argv: list[str] | None = None) -> int:
    """Run `iedit` with `argv` (default: the process's).

    Returns the exit code: 0 done, 1 done but for some edits that failed, 2 the user's mistake.
    """
    start = time.perf_counter()
    args = build_parser().parse_args(argv)
    try:
        where, details = args.run(args)
    except (UserError, FailedEditsError) as error:
        message = " ".join(str(error).split())
        print(f"iedit {args.command}: error: {message}", file=sys.stderr)
        return 1 if isinstance(error, FailedEditsError) else 2
    except KeyboardInterrupt:
        print(f"iedit {args.command}: interrupted", file=sys.stderr)
        return 130
    print(f"{where}: {time.perf_counter() - start:.1f} s{details}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
