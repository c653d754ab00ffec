"""Small sets of pairs, a tiny base, and train_iedit.py on them: in this process, or in one that is quick to start."""

import csv
import logging
import multiprocessing
import os
import pkgutil
import random
import runpy
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import tiny_models
import torch
from accelerate.state import AcceleratorState, GradientState
from accidents import print_to
from datasets import Dataset
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from diffusers_iedit import IEditPipeline, mini
from diffusers_iedit.pairs.schema import FEATURES


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import train_iedit


SCRIPT = Path(train_iedit.__file__)

UNET = "unet/diffusion_pytorch_model.safetensors"
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"

COUNT = 12


def make_rows(count: int = COUNT, first_seed: int = 300_000) -> list[dict]:
    """Pairs of a scene of the mini world and the same scene with its thing in another colour, or another thing."""
    nouns, colours, rows = list(mini.NOUNS), list(mini.COLOURS), []
    for seed in range(first_seed, first_seed + count):
        source = mini.render(seed, things=1)
        if seed % 2:
            target = source.swap(thing=nouns[nouns.index(source.thing.noun) - 1])
        else:
            target = source.swap(colour=colours[colours.index(source.thing.colour) - 1])
        row = {"source_caption": source.caption, "edit_prompt": target.caption, "similarity": 0.5}
        for side, scene in (("source", source), ("target", target)):
            row |= {f"{side}_image": scene.image, f"{side}_mask": scene.mask, f"{side}_term": scene.thing.name}
        rows.append(row)
    return rows


def write_pairs(folder: Path, rows: list[dict], columns=FEATURES) -> Path:
    """Rows as a set of pairs that `load_pairs` opens, by default with all columns."""
    features = datasets.Features({name: FEATURES[name] for name in columns})
    folder.mkdir(parents=True)
    pairs = Dataset.from_dict({name: [row[name] for row in rows] for name in columns}, features=features)
    pairs.to_parquet(folder / "train.parquet")
    return folder


def write_base(folder: Path, **scheduler) -> Path:
    """A tiny random Stable Diffusion for pictures of 32 pixels; with entries of its scheduler's config changed."""
    components = tiny_models.sd_components(vae_scale_factor=4)
    components["scheduler"] = components["scheduler"].from_config(components["scheduler"].config, **scheduler)
    IEditPipeline(**components).save_pretrained(folder)
    return folder


def write_sdxl_base(folder: Path, **options) -> Path:
    """A tiny random Stable Diffusion XL for pictures of 32 pixels."""
    components = tiny_models.sdxl_components(vae_scale_factor=4)
    StableDiffusionXLImg2ImgPipeline(**components, **options).save_pretrained(folder)
    return folder


def write_sd3_base(folder: Path, layers: int = 3) -> Path:
    """A tiny random Stable Diffusion 3 for pictures of 32 pixels."""
    components = tiny_models.sd3_components(vae_scale_factor=4, num_layers=layers)
    tokenizer = T5Tokenizer(extra_ids=0)
    config = T5Config(vocab_size=len(tokenizer), d_model=64, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components |= {"text_encoder_3": T5EncoderModel(config).eval(), "tokenizer_3": tokenizer}
    StableDiffusion3Img2ImgPipeline(**components).save_pretrained(folder)
    return folder


def arguments(pairs: Path, base: str | Path, output_dir: Path, *others) -> list[str]:
    """A command line for few and small steps; `others` come last, and so prevail."""
    argv = [
        *("--train_data", pairs, "--output_dir", output_dir, "--model", base),
        *("--clip_model", "mini", "--perceptual_model", "mini", "--resolution", 32, "--train_batch_size", 2),
        *("--max_train_steps", 4, "--learning_rate", 1e-3, "--caption_dropout", 0.1, "--num_validation_pairs", 0),
        *("--dataloader_num_workers", 0, "--mixed_precision", "no", "--report_to", "none", *others),
    ]
    return [str(argument) for argument in argv]


@contextmanager
def process_as_before(cpu: bool = True):
    """On the CPU, or else the GPU, and in one thread; afterwards, what a training changes in its process is undone."""
    libraries = (datasets.utils.logging, diffusers_logging, transformers_logging)
    verbosities = [library.get_verbosity() for library in libraries]
    with_bars = [library for library in libraries if library.is_progress_bar_enabled()]
    handlers, level = logging.root.handlers[:], logging.root.level
    handler, numbers, state = signal.getsignal(signal.SIGTERM), random.getstate(), np.random.get_state()
    threads = torch.get_num_threads()
    # With more threads, sums are rounded otherwise.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), mock.patch.dict(os.environ, ACCELERATE_USE_CPU=str(cpu)):
            yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        torch.set_num_threads(threads)
        np.random.set_state(state)
        random.setstate(numbers)
        signal.signal(signal.SIGTERM, handler)
        logging.root.handlers, logging.root.level = handlers, level
        for library, verbosity in zip(libraries, verbosities, strict=True):
            library.set_verbosity(verbosity)
        for library in with_bars:
            library.enable_progress_bar()


def train(argv: list[str], cpu: bool = True) -> None:
    """train_iedit.py in this process."""
    with process_as_before(cpu):
        train_iedit.main(train_iedit.parse_args(argv))


def command(argv: list[str]) -> None:
    """train_iedit.py in this process, as a command: an error comes as SystemExit."""
    with process_as_before(), mock.patch.object(sys, "argv", [str(SCRIPT), *argv]):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def losses(output_dir: Path) -> list[dict[str, float]]:
    """The lines of losses.csv."""
    with (output_dir / "losses.csv").open() as file:
        return [{name: float(value) for name, value in line.items()} for line in csv.DictReader(file)]


def weights_file(folder: Path) -> Path:
    """Where a pipeline's UNet or transformer has its weights."""
    (file,) = [folder / name for name in (UNET, TRANSFORMER) if (folder / name).exists()]
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a pipeline's UNet or transformer."""
    return load_file(weights_file(folder))


def same_end(output_dir: Path, undisturbed: Path) -> bool:
    """Whether a training ended bit for bit as another one, with each step once in losses.csv."""
    assert losses(output_dir) == losses(undisturbed)
    assert not [file for file in output_dir.rglob("*") if "partial" in file.name]
    for name in ("model_index.json", "README.md", "loss.png", "training_args.json"):
        assert (output_dir / name).exists(), name
    return weights_file(output_dir).read_bytes() == weights_file(undisturbed).read_bytes()


# In processes of their own


def processes():
    """A context for processes that begin with all modules imported, and nothing used of them yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_pairs"])
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return context


@contextmanager
def calling(function: str, number: int, act: Callable[[], None]):
    """Before the `number`-th call of a function, which is given by its full name, `act` is called."""
    original, seen = pkgutil.resolve_name(function), 0

    def counted(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == number:
            act()
        return original(*args, **kwargs)

    with mock.patch(function, counted):
        yield


def run(
    argv: list[str],
    log: Path,
    environment: dict[str, str] = {},
    function: str = "train_iedit.main",
    number: int = 0,
    signum: int = signal.SIGKILL,
    to_all: bool = False,
) -> None:
    """The command, with what it prints in the file `log`.

    Before the `number`-th call of `function` it gets a signal; `to_all`: with all processes that it has started.
    """
    os.environ.update(environment)
    os.setpgrp()
    # What the command would start its own processes by, instead of what started this one.
    multiprocessing.set_start_method("fork", force=True)
    print_to(log)
    # What pytest would take up, the process has to print by itself.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    with calling(function, number, lambda: os.killpg(0, signum) if to_all else os.kill(os.getpid(), signum)):
        command(argv)
