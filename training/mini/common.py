"""What the training scripts of the mini models share: the data set, resumable runs, and saving small weights."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from transformers import PreTrainedModel

from diffusers_iedit.finetuning.outputs import apply_umask
from diffusers_iedit.mini import COLOURS, NOUNS, SCENES, Scene, caption, render


FIRST_TRAINING_SEED = 1_000_000
"""`render` promises that the models never saw smaller seeds: those are left for measuring."""

NOUN_LIST, COLOUR_LIST, SCENE_LIST = list(NOUNS), list(COLOURS), list(SCENES)


@dataclass
class MiniWorld:
    """Rendered training scenes; even indices hold one thing, odd ones two. -1 stands for "no second thing"."""

    images: np.ndarray  # (N, 64, 64, 3) uint8
    labels: np.ndarray  # (N, 64, 64) uint8: 0 background, 1 the first (left) thing, 2 the second
    nouns: np.ndarray  # (N, 2) int8, index into NOUN_LIST
    colours: np.ndarray  # (N, 2) int8, index into COLOUR_LIST
    scenes: np.ndarray  # (N,) int8, index into SCENE_LIST

    def __len__(self) -> int:
        return len(self.images)


def describe(scene: Scene) -> tuple[np.ndarray, ...]:
    """A scene as the arrays of `MiniWorld`, without the leading N."""
    labels = np.zeros(scene.image.size[::-1], dtype=np.uint8)
    for number, mask in enumerate(scene.masks, start=1):
        labels[np.asarray(mask) == 255] = number
    missing = [-1] * (2 - len(scene.things))
    nouns = [NOUN_LIST.index(thing.noun) for thing in scene.things] + missing
    colours = [COLOUR_LIST.index(thing.colour) for thing in scene.things] + missing
    return np.asarray(scene.image), labels, nouns, colours, SCENE_LIST.index(scene.scene)


def _describe_seed(seed: int) -> tuple[np.ndarray, ...]:
    return describe(render(seed, things=1 + seed % 2, split="train"))


def load_world(work_dir: Path, size: int) -> MiniWorld:
    """The training scenes; rendered once into `work_dir` and memory-mapped after that."""
    folder = work_dir / f"world-{size}"
    names = list(MiniWorld.__dataclass_fields__)
    if not folder.exists():
        seeds = range(FIRST_TRAINING_SEED, FIRST_TRAINING_SEED + size)
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            columns = zip(*pool.map(_describe_seed, seeds, chunksize=256), strict=True)
            partial = folder.with_suffix(".partial")
            partial.mkdir(parents=True, exist_ok=True)
            for name, column in zip(names, columns, strict=True):
                np.save(
                    partial / f"{name}.npy", np.array(column, np.uint8 if name in ("images", "labels") else np.int8)
                )
        partial.rename(folder)
    return MiniWorld(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})


def world_captions(world: MiniWorld) -> list[str]:
    """The caption of each scene."""
    return [
        caption(
            [(NOUN_LIST[n], COLOUR_LIST[c]) for n, c in zip(nouns, colours, strict=True) if n >= 0], SCENE_LIST[scene]
        )
        for nouns, colours, scene in zip(world.nouns, world.colours, world.scenes, strict=True)
    ]


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)).div(127.5).sub(1)


def add_run_arguments(
    parser: argparse.ArgumentParser, steps: int, batch_size: int, learning_rate: float, precision: str
) -> None:
    """The options that every part of the training has."""
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/mini"), help="cache, checkpoints and logs")
    parser.add_argument("--world_size", type=int, default=32_000, help="number of training scenes to render")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--warmup_steps", type=int, default=100)
    parser.add_argument("--mixed_precision", default=precision, choices=["no", "fp16", "bf16"])
    parser.add_argument("--checkpoint_minutes", type=float, default=4.0)
    parser.add_argument("--report_steps", type=int, default=250, help="print the training loss and metrics this often")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; two trainings side by side need 1 each")
    parser.add_argument("--seed", type=int, default=0)


class Run:
    """A training run that can be stopped at any time and started again with the same command.

    Batches depend on the seed and the step alone, so a resumed run sees what an uninterrupted one would have seen.
    """

    def __init__(self, name: str, args: argparse.Namespace):
        torch.set_num_threads(args.threads)
        torch.set_flush_denormal(True)  # vanishing gradients are slow on a CPU
        self.args, self.folder = args, args.work_dir / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        self.device = self.accelerator.device
        self.ema = None
        set_seed(args.seed)

    def prepare(self, model: torch.nn.Module, extra: list[torch.nn.Module] = ()) -> torch.nn.Module:
        """Sets up AdamW with warm-up and cosine decay for a model and `extra` modules; returns the prepared model."""
        args = self.args
        parameters = [p for module in (model, *extra) for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / args.warmup_steps, 0.5 * (1 + math.cos(math.pi * min(step / args.steps, 1.0))) + 1e-3
            ),
        )
        self.optimizer, self.scheduler = self.accelerator.prepare(optimizer, scheduler)
        self.parameters = parameters
        return self.accelerator.prepare(model)

    def average(self, model: torch.nn.Module) -> EMAModel:
        """The moving average of a prepared model's weights, which checkpoints keep."""
        self.ema = EMAModel(model.parameters(), decay=0.999, foreach=True)
        self.accelerator.register_for_checkpointing(self.ema)
        return self.ema

    def steps(self):
        """Yields the remaining (step, numpy generator of this step), and saves checkpoints in between."""
        args, first = self.args, 0
        if checkpoints := sorted(self.folder.glob("checkpoint-*")):
            self.accelerator.load_state(checkpoints[-1])
            if self.ema is not None:
                self.ema.to(self.device)  # it comes back on the CPU
            first = int(checkpoints[-1].name.removeprefix("checkpoint-"))
        saved = started = time.monotonic()
        for step in range(first, args.steps):
            yield step, np.random.default_rng([args.seed, step])
            if step == first + 20:
                pace = (time.monotonic() - started) / 21
                self.log(step, seconds_per_step=pace, minutes_to_go=pace * (args.steps - step) / 60)
            if time.monotonic() - saved > 60 * args.checkpoint_minutes or step + 1 == args.steps:
                self._save(step + 1)
                saved = time.monotonic()

    def _save(self, step: int) -> None:
        # Under its final name a checkpoint is complete, and the one before goes only then.
        older = list(self.folder.glob("checkpoint-*"))
        partial = self.folder / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.save_state(partial)
        partial.rename(self.folder / f"checkpoint-{step:06}")
        for checkpoint in older:
            shutil.rmtree(checkpoint)

    def update(self, loss: torch.Tensor) -> None:
        """One optimiser step."""
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    @contextmanager
    def finished(self, name: str):
        """A folder to save the trained part in, which gets its name when all is saved: it is complete or absent."""
        partial = self.folder / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        apply_umask(partial)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        partial.rename(self.folder / name)

    def log(self, step: int, **values: float) -> None:
        """Prints a line of numbers."""
        line = "  ".join(f"{name} {torch.as_tensor(value).item():.4g}" for name, value in values.items())
        self.accelerator.print(f"{time.strftime('%H:%M:%S')}  step {step}  {line}", flush=True)


def declare_fp32(folder: Path) -> None:
    """Makes a plain `from_pretrained` load fp16 weights in fp32: transformers 5 takes the dtype from the config.

    A tower that is loaded alone takes it from its own part of the config.
    """
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if part is not None:
            part["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_half(model: torch.nn.Module, folder: Path) -> None:
    """Saves a model with fp16 weights; loaded without a dtype it is fp32 again. The model itself becomes fp16."""
    model.half().save_pretrained(folder)
    if isinstance(model, PreTrainedModel):
        declare_fp32(folder)
