"""Checkpoints of the fine-tuning: complete or absent, and only for the configuration that wrote them."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from .outputs import apply_umask


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
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            apply_umask(partial)
            # Last, and with what tells later whether all is there as it was written.
            state = {"step": step, "config": config, "files": _digests(partial)}
            (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n")
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


def _digests(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 of each file but `state.json`, by its path."""
    digests = {}
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != STATE_FILE):
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while part := opened.read(2**20):
                digest.update(part)
        digests[file.relative_to(checkpoint).as_posix()] = digest.hexdigest()
    return digests


def _read_state(checkpoint: Path) -> dict:
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text())
        return {name: state[name] for name in ("step", "config", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"has no {STATE_FILE} of this script") from error


def _check_files(checkpoint: Path) -> None:
    """Raises a ValueError, which goes on from the checkpoint's name, unless all is as it was written."""
    written, found = _read_state(checkpoint)["files"], _digests(checkpoint)
    for name, digest in written.items():
        if name not in found:
            raise ValueError(f"lacks {name}")
        if found[name] != digest:
            raise ValueError(f"is damaged: {name} is not as it was written")


def _is_whole(checkpoint: Path) -> bool:
    try:
        _check_files(checkpoint)
    except (ValueError, OSError):
        return False
    return True


def choose_checkpoint(output_dir: Path, chosen: str | None, overwrite: bool = False) -> Path | None:
    """The checkpoint that a run goes on from, before anything is loaded; None if it begins anew.

    Args:
        output_dir (`Path`): The run's folder.
        chosen (`str`, *optional*): "latest", or a checkpoint's name.
        overwrite (`bool`): Whether a run that begins anew may take the place of another one.

    Raises:
        ValueError: If the run would replace another one untold, or if there is no such checkpoint.
    """
    checkpoints = {path.name: path for path in list_checkpoints(output_dir)}
    if chosen not in (None, "latest") and chosen not in checkpoints:
        found = ", ".join(checkpoints) or "none"
        raise ValueError(f"`resume_from_checkpoint`: {output_dir} has no {chosen}; its checkpoints: {found}.")
    if checkpoints and chosen:
        return list(checkpoints.values())[-1] if chosen == "latest" else checkpoints[chosen]
    if not overwrite:
        instead = "take another folder, or begin anew in this one with --overwrite_output_dir."
        if checkpoints:
            raise ValueError(
                f"`output_dir` {output_dir} holds checkpoints of an earlier run: go on from them with"
                f" --resume_from_checkpoint latest, {instead}"
            )
        if (output_dir / "model_index.json").exists():
            raise ValueError(
                f"`output_dir` {output_dir} holds a finished model, and no checkpoint to go on from: {instead}"
            )
    return None


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a training left half-written when it was killed. No other one may be at work."""
    # An evaluation in this folder looks after its own.
    patterns = ("*.partial", "checkpoint.removed", "images/*.partial", "cache/*/*.partial")
    for path in [path for pattern in patterns for path in output_dir.glob(pattern)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_later(checkpoint: Path) -> None:
    """Removes the checkpoints after one that a run goes on from: their steps are taken again."""
    # The newest first: at no moment are there gaps.
    for later in reversed(list_checkpoints(checkpoint.parent)):
        if later == checkpoint:
            break
        _remove(later)


def remove_run(output_dir: Path) -> None:
    """Removes what an earlier run left and a new one could take for its own; cached latents stay."""
    # Without it, the folder holds no finished model.
    (output_dir / "model_index.json").unlink(missing_ok=True)
    for checkpoint in list_checkpoints(output_dir):
        _remove(checkpoint)
    for name in ("images", "logs", "lora", "evaluation"):
        shutil.rmtree(output_dir / name, ignore_errors=True)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, config: dict) -> int:
    """Restores a checkpoint.

    Args:
        accelerator (`Accelerator`): With everything prepared, and `register_hooks` called.
        checkpoint (`Path`): A folder from `save_checkpoint`.
        config (`dict`): What must be as it was when the checkpoint was written.

    Returns:
        `int`: The number of steps that had been taken.

    Raises:
        ValueError: If this is no whole checkpoint, or if it is one of another configuration.
    """
    faults: list[str | None] = [None]
    if accelerator.is_main_process:
        try:
            _check_files(checkpoint)
        except ValueError as error:
            others = [path for path in reversed(list_checkpoints(checkpoint.parent)) if path != checkpoint]
            newest = next((path.name for path in others if _is_whole(path)), None)
            advice = "no other one is whole"
            if newest:
                advice = f"the newest whole one is {newest}: --resume_from_checkpoint {newest}"
            faults = [f"`resume_from_checkpoint`: {checkpoint} {error}; {advice}."]
    if fault := broadcast_object_list(faults)[0]:
        raise ValueError(fault)
    state = _read_state(checkpoint)
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
