"""Edits of fixed pairs while a model is trained, side by side with what its base makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers.utils import numpy_to_pil
from PIL import Image

from ..resuming import replacing
from .data import PairStream
from .families import Family


COLUMNS = ("source", "mask", "SDEdit", "iEdit", "iEdit-M")


class Validation:
    """Edits the first pairs of a set, shared out among the processes, one picture at a time.

    Built before the training begins, it keeps what the base makes of the pairs: SDEdit, with the same noise.

    Args:
        accelerator (`Accelerator`): Of the training.
        family ([`Family`]): The base, with the model that is trained.
        pairs ([`~datasets.Dataset`]): With the columns of `pairs.schema.FEATURES`.
        resolution (`int`): Of the pictures, in pixels.
        seed (`int`): Of the noise, which is the same for all columns and at every time.
        interrupted (`Callable`): Asked after each denoising step whether to leave the grid and come back.
        **settings: `strength`, `guidance_scale` and `num_inference_steps` of the edits.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        family: Family,
        pairs: Dataset,
        resolution: int,
        seed: int,
        interrupted: Callable[[], bool] = lambda: False,
        **settings,
    ):
        self.accelerator = accelerator
        self.model = family.model
        self.editor = family.editor(accelerator.device)
        self.seed = seed
        self.interrupted = interrupted
        self.settings = settings
        stream = PairStream(pairs, resolution)
        # Under FSDP every process has to take part in every forward pass, so all get equally many rows.
        with accelerator.split_between_processes(list(range(len(pairs))), apply_padding=True) as rows:
            self.samples = [(row, stream.sample(row, None, False)) for row in rows]
        self.base = [self._edit(row, sample) for row, sample in self.samples]

    def _edit(self, row: int, sample: dict, mask: torch.Tensor | None = None) -> Image.Image:
        training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            (image,) = self.editor(
                sample["source_image"],
                sample["edit_prompt"],
                mask_image=mask,
                generator=torch.Generator().manual_seed(self.seed + row),
                callback_on_step_end=self._end_if_interrupted,
                **self.settings,
            ).images
        self.model.train(training)
        return image

    def _end_if_interrupted(self, pipe: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        pipe._interrupt = self.interrupted()
        return {}

    def __call__(self) -> Image.Image | None:
        """One row for each pair, with the columns of `COLUMNS`; the same on all processes.

        None if any of them was interrupted.
        """
        rows = []
        for (row, sample), base in zip(self.samples, self.base, strict=True):
            pictures = torch.stack([sample["source_image"], sample["source_mask"].expand(3, -1, -1)])
            pictures = numpy_to_pil(pictures.permute(0, 2, 3, 1).numpy())
            edits = [self._edit(row, sample), self._edit(row, sample, sample["source_mask"])]
            rows.append((row, [*pictures, base, *edits]))
        if any(gather_object([self.interrupted()])):
            return None
        # Padding repeats rows.
        by_row = dict(gather_object(rows))
        width, height = by_row[0][0].size
        grid = Image.new("RGB", (width * len(COLUMNS), height * len(by_row)))
        for number in sorted(by_row):
            for column, image in enumerate(by_row[number]):
                grid.paste(image, (width * column, height * number))
        return grid

    def save(self, file: Path) -> Image.Image | None:
        """Calls it and writes the grid, if there is one, to a PNG, on the main process."""
        grid = self()
        if grid is not None and self.accelerator.is_main_process:
            with replacing(file) as partial:
                grid.save(partial, "PNG")
        return grid
