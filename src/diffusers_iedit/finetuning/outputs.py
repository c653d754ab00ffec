"""What a training leaves behind beside its checkpoints: the curve of its losses, and the pipeline's folder."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import stat
from pathlib import Path

from diffusers import DiffusionPipeline

from ..loading import SHIPPED_PIPELINES
from .families import Family


class LossLog:
    """A CSV file with a line for each step: `step`, `loss`, each term without its weight, `learning_rate`, and
    `left_out`, the number of samples that had no part in it.

    Args:
        file (`Path`): The file.
        columns (`list[str]`): Its columns.
        last_step (`int`): Lines of later steps are cut off, so that a resumed run writes each step once.
    """

    def __init__(self, file: Path, columns: list[str], last_step: int):
        self.file = file
        self.columns = columns
        kept = [row for row in self.read() if row["step"] <= last_step] if last_step else []
        partial = file.with_suffix(".partial")
        with partial.open("w", newline="") as opened:
            # An older version left out none.
            writer = csv.DictWriter(opened, columns, restval="0")
            writer.writeheader()
            writer.writerows(row | {"step": int(row["step"])} for row in kept)
        partial.replace(file)

    @property
    def losses(self) -> list[str]:
        """The columns that are losses."""
        return [name for name in self.columns if name not in ("step", "learning_rate", "left_out")]

    def write(self, row: dict[str, float]) -> None:
        """Appends one line."""
        with self.file.open("a", newline="") as opened:
            csv.DictWriter(opened, self.columns).writerow(row)

    def read(self) -> list[dict[str, float]]:
        """All lines, as numbers; a last one that was cut off is left out."""
        if not self.file.exists():
            return []
        text = self.file.read_text()
        whole = text[: text.rfind("\n") + 1].splitlines()
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(whole)]

    def plot(self, file: Path) -> None:
        """Draws each column of losses over the steps, as means over a hundredth of the run, into a PNG."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        rows, losses = self.read(), self.losses
        window = max(1, len(rows) // 100)
        width = 3.2 * len(losses)
        figure, axes = pyplot.subplots(1, len(losses), figsize=(width, 2.6))
        # In inches: matplotlib's own search for the margins takes longer than all the rest.
        figure.subplots_adjust(left=0.6 / width, right=1 - 0.2 / width, bottom=0.19, top=0.9, wspace=0.3)
        for axis, name in zip(axes, losses, strict=True):
            chunks = [rows[start : start + window] for start in range(0, len(rows), window)]
            means = [sum(row[name] for row in chunk) / len(chunk) for chunk in chunks]
            axis.plot([chunk[-1]["step"] for chunk in chunks], means)
            axis.set(title=name, xlabel="step")
        partial = file.with_suffix(".partial")
        figure.savefig(partial, format="png", dpi=100)
        pyplot.close(figure)
        partial.replace(file)


def check_folders(args: argparse.Namespace) -> None:
    """Makes sure that what is written does not take the place of what is read.

    Raises:
        ValueError: If `output_dir` is the folder of a model, or if it or `cache_dir` lies among the pairs.
    """
    folders = {name: folder for name, (folder, _) in SHIPPED_PIPELINES.items()}
    for name in ("output_dir", "cache_dir"):
        written = getattr(args, name)
        for option in ("model", "clip_model", "perceptual_model", "loss_decoder"):
            given = getattr(args, option)
            if written and given and written.resolve() == Path(folders.get(given, given)).resolve():
                raise ValueError(
                    f"`{name}` {written} is the folder of `{option}` {given}, which it would overwrite: take another."
                )
        for option in ("train_data", "validation_data", "evaluation_data"):
            given = getattr(args, option)
            folder = Path(given.removeprefix("pie-bench:")) if given else None
            if written and folder and folder.exists() and written.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"`{name}` {written} lies in `{option}` {given}, which would then hold what is made from it: take"
                    " another folder."
                )


def apply_umask(folder: Path) -> None:
    """Gives the weights in a folder, and below it, the mode of any new file.

    safetensors lets nobody but their owner read them, and with it diffusers and transformers.
    """
    probe = folder / "mode.partial"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Saves a pipeline into a folder that may hold other files and an older pipeline.

    It is written in full under a temporary name first. `model_index.json` comes last: with it, the folder is complete.

    Raises:
        OSError: If it cannot be written; what was there before is as it was.
    """
    partial = folder / "pipeline.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipe.save_pretrained(partial)
        for file in [partial / "model_index.json", *partial.glob("*/*config.json")]:
            # The paths of this machine are nobody's business.
            config = json.loads(file.read_text(encoding="utf-8"))
            if [config.pop(name) for name in ("_name_or_path", "name_or_path", "local_files_only") if name in config]:
                file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        apply_umask(partial)
    except Exception as error:
        # A full disk comes as an OSError or a SafetensorError, depending on who was writing.
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"The pipeline could not be written to {folder}: {error}") from error
    (folder / "model_index.json").unlink(missing_ok=True)
    for part in sorted(partial.iterdir(), key=lambda part: part.name == "model_index.json"):
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        part.replace(folder / part.name)
    partial.rmdir()


def save_lora(family: Family, folder: Path) -> None:
    """Saves the model's LoRA layers, for `pipe.load_lora_weights` on the base, and merges them into the model.

    Raises:
        OSError: If they cannot be written; what was there before is as it was.
    """
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        family.pipeline_class.save_lora_weights(partial, **family.lora_state())
        apply_umask(partial)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"The LoRA layers could not be written to {folder}: {error}") from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    family.model.fuse_lora()
    family.model.unload_lora()
