"""Checkpoints of the fine-tuning: complete or absent, and only for the configuration that wrote them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file


STATE_FILE, TRAINED_FILE, EMA_FILE = "state.json", "trained.safetensors", "ema.safetensors"


def register_hooks(accelerator: Accelerator, trainable: dict[str, torch.nn.Parameter], ema: EMAModel | None) -> None:
    """Makes `accelerator.save_state` keep the trained parameters and their average alone, not the frozen UNet.

    They go to safetensors. Under FSDP the parameters are sharded, and accelerate's own files stay in place.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        return

    def save(models, weights, output_dir):
        # accelerate saves what is left in `weights`.
        weights.clear()
        if accelerator.is_main_process:
            save_file(
                {name: p.detach().contiguous() for name, p in trainable.items()},
                Path(output_dir, "trained.safetensors"),
            )
            if ema is not None:
                save_file(dict(zip(trainable, ema.shadow_params, strict=True)), Path(output_dir, EMA_FILE))

    def load(models, input_dir):
        # accelerate loads what is left in `models`.
        models.clear()
        with torch.no_grad():
            for name, values in load_file(Path(input_dir, TRAINED_FILE)).items():
                trainable[name].copy_(values)
        if ema is not None:
            averages = load_file(Path(input_dir, EMA_FILE))
            ema.shadow_params = [averages[name].to(p.device) for name, p in trainable.items()]
            ema.optimization_step = json.loads(Path(input_dir, STATE_FILE).read_text())["step"]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, the newest last."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _remove(checkpoint: Path) -> None:
    # Half removed, it must not bear a checkpoint's name.
    removed = checkpoint.with_name("checkpoint.removed")
    shutil.rmtree(removed, ignore_errors=True)
    checkpoint.rename(removed)
    shutil.rmtree(removed)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, config: dict, total_limit: int | None
) -> None:
    """Writes `checkpoint-<step>`, on all processes together, and removes the oldest above `total_limit`.

    Raises:
        OSError: If it cannot be written; the checkpoints before are as they were.
    """
    final, partial = output_dir / f"checkpoint-{step}", output_dir / "checkpoint.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        if accelerator.is_main_process:
            (partial / STATE_FILE).write_text(json.dumps({"step": step, "config": config}, indent=2) + "\n")
    except Exception as error:
        # A full disk comes as an OSError, a RuntimeError or a SafetensorError, depending on who was writing, and not
        # every one of them says so.
        free = shutil.disk_usage(output_dir).free / 2**20
        shutil.rmtree(partial, ignore_errors=True)
        kept = [path.name for path in list_checkpoints(output_dir)]
        resume = f" {kept[-1]} is complete; --resume_from_checkpoint latest goes on from it." if kept else ""
        raise OSError(
            f"The checkpoint of step {step} could not be written to {output_dir}, which had {free:,.0f} MiB free:"
            f" {str(error).rstrip('.')}.{resume}"
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if final.exists():
            _remove(final)
        partial.rename(final)
        if total_limit is not None:
            for checkpoint in list_checkpoints(output_dir)[:-total_limit]:
                _remove(checkpoint)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, config: dict) -> int:
    """Restores a checkpoint.

    Args:
        accelerator (`Accelerator`): With everything prepared, and `register_hooks` called.
        checkpoint (`Path`): A folder from `save_checkpoint`.
        config (`dict`): What must be as it was when the checkpoint was written.

    Returns:
        `int`: The number of steps that had been taken.

    Raises:
        ValueError: If this is no checkpoint, or if it is one of another configuration.
    """
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"`resume_from_checkpoint`: {checkpoint} is no checkpoint of this script.") from error
    written = state["config"]
    differences = [
        f"{name} was {written.get(name)!r} and is {config.get(name)!r}"
        for name in sorted(written.keys() | config.keys())
        if written.get(name) != config.get(name)
    ]
    if differences:
        raise ValueError(
            f"`resume_from_checkpoint`: {checkpoint} is of another configuration: {'; '.join(differences)}."
        )
    accelerator.load_state(str(checkpoint))
    return state["step"]
