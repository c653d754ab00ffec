"""Small sets of edits in the forms of public ones, with pictures of the mini world, whose truth is known."""

import io
import json
import os
import sys
import tarfile
from dataclasses import fields, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from accidents import killed_at, print_to
from PIL import Image

from diffusers_iedit import mini
from diffusers_iedit.pairs.importing import import_pairs
from diffusers_iedit.pairs.jobs import ImportOptions
from diffusers_iedit.pairs.options import CaptionOptions, ReadPairsOptions, SegmentOptions, SimilarityOptions


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import import_pairs as script


COUNT, SHARD_SIZE, FIRST_SEED = 6, 4, 310_000


class Pair:
    """A scene before and after an edit: another colour, or also another thing."""

    def __init__(self, seed: int):
        self.before = mini.render(seed, things=1)
        colours, nouns = list(mini.COLOURS), list(mini.NOUNS)
        changes = {"colour": colours[colours.index(self.before.thing.colour) - 1]}
        if seed % 2:
            changes["thing"] = nouns[nouns.index(self.before.thing.noun) - 1]
        self.after = self.before.swap(**changes)
        self.instruction = f"make it a {self.after.thing.name}"

    @property
    def mask(self) -> np.ndarray:
        """Where both pictures differ, (SIZE, SIZE) bool: the old thing and the new one."""
        return (np.asarray(self.before.mask) | np.asarray(self.after.mask)) > 0


def pairs(count: int = COUNT, first_seed: int = FIRST_SEED) -> list[Pair]:
    return [Pair(seed) for seed in range(first_seed, first_seed + count)]


def png(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def transparent(pair: Pair) -> Image.Image:
    """A mask as MagicBrush has it: the source, with the region to edit cut out."""
    layer = pair.before.image.convert("RGBA")
    layer.putalpha(Image.fromarray(np.where(pair.mask, 0, 255).astype(np.uint8)))
    return layer


def white(pair: Pair) -> Image.Image:
    """A mask as UltraEdit has it: white on black, in colours."""
    return Image.fromarray(pair.mask.astype(np.uint8) * 255).convert("RGB")


def runs(mask: np.ndarray) -> str:
    """A mask as PIE-Bench++ has it."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.ravel().astype(np.int8), [0]))))
    return " ".join(f"{start} {end - start}" for start, end in edges.reshape(-1, 2))


# A row of each public set, by the name of its format.
FORMS = {
    "instructpix2pix": lambda pair: {
        "original_prompt": pair.before.caption,
        "original_image": png(pair.before.image),
        "edit_prompt": pair.instruction,
        "edited_prompt": pair.after.caption,
        "edited_image": png(pair.after.image),
    },
    "magicbrush": lambda pair: {
        "img_id": "1",
        "turn_index": 1,
        "source_img": png(pair.before.image),
        "mask_img": png(transparent(pair)),
        "instruction": pair.instruction,
        "target_img": png(pair.after.image),
    },
    "ultraedit": lambda pair: {
        "source_image": png(pair.before.image),
        "mask_image": png(white(pair)),
        "edited_image": png(pair.after.image),
        "edit_prompt": pair.instruction,
        "source_caption": pair.before.caption,
        "target_caption": pair.after.caption,
    },
    "omniedit": lambda pair: {
        "omni_edit_id": "a",
        "src_img": png(pair.before.image),
        "edited_img": png(pair.after.image),
        "edited_prompt_list": [pair.instruction, f"Let there be {pair.after.thing.name}."],
    },
    "nhr-edit": lambda pair: {
        "source_image": png(pair.before.image),
        "edited_image": png(pair.after.image),
        "edit_instruction": pair.instruction,
        "img_width": 64,
    },
}


def features(row: dict) -> datasets.Features:
    kinds = {dict: datasets.Image(), str: datasets.Value("string"), int: datasets.Value("int64")}
    kinds[list] = datasets.List(datasets.Value("string"))
    return datasets.Features({name: kinds[type(value)] for name, value in row.items()})


def to_dataset(rows: list[dict]) -> datasets.Dataset:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return datasets.Dataset.from_dict(columns, features=features(rows[0]))


def write_parquet(folder: Path, rows: list[dict], split: str = "train") -> Path:
    (folder / "data").mkdir(parents=True, exist_ok=True)
    to_dataset(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def write_image_folder(folder: Path, rows: list[dict]) -> Path:
    """Files and a metadata.jsonl which names them, as `datasets` reads them."""
    folder.mkdir(parents=True)
    lines = []
    for number, row in enumerate(rows):
        line = {}
        for name, value in row.items():
            if isinstance(value, dict):
                (folder / f"{number}_{name}.png").write_bytes(value["bytes"])
                line[f"{name}_file_name"] = f"{number}_{name}.png"
            else:
                line[name] = value
        lines.append(json.dumps(line))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_arrow(folder: Path, rows: list[dict]) -> Path:
    to_dataset(rows).save_to_disk(folder)
    return folder


def write_arrow_splits(folder: Path, rows: list[dict]) -> Path:
    datasets.DatasetDict({"train": to_dataset(rows)}).save_to_disk(folder)
    return folder


def write_webdataset(folder: Path, rows: list[dict]) -> Path:
    """A tar whose members end as their columns are called."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "set-000.tar", "w") as tar:
        for number, row in enumerate(rows):
            for name, value in row.items():
                is_image = isinstance(value, dict)
                content = value["bytes"] if is_image else str(value).encode()
                member = tarfile.TarInfo(f"{number:04}.{name}.{'png' if is_image else 'txt'}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def options(source: Path | str, **changes) -> ImportOptions:
    """Options for the mini models; `changes` are given by their names, whatever their stage."""
    base = ImportOptions(
        ReadPairsOptions(source=str(source), shard_size=SHARD_SIZE),
        CaptionOptions(caption_model="mini"),
        SimilarityOptions(clip_model="mini"),
        SegmentOptions(mask_model="mini"),
    )
    for stage in ("read", "caption", "embed", "mask"):
        known = {field.name for field in fields(getattr(base, stage))}
        chosen = {name: changes.pop(name) for name in known & changes.keys()}
        setattr(base, stage, replace(getattr(base, stage), **chosen))
    assert not changes
    return base


def run(output_dir: Path, chosen: ImportOptions, **how) -> dict:
    """`import_pairs` on one thread: with more, sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return import_pairs(output_dir, chosen, **how)
    finally:
        torch.set_num_threads(threads)


def arguments(source: Path | str, output_dir: Path, *others: str) -> list[str]:
    """The command line that `options` stands for."""
    return [
        *("--source", str(source), "--output_dir", str(output_dir), "--shard_size", str(SHARD_SIZE)),
        *("--caption_model", "mini", "--clip_model", "mini", "--mask_model", "mini", *others),
    ]


# In processes of their own


def run_and_die(output_dir: Path, chosen: ImportOptions, part: str, number: int) -> None:
    """Is killed when the `number`-th file below a folder `part` is to get its name."""
    with killed_at(part, number):
        run(output_dir, chosen)


def command(argv: list[str], log: Path, environment: dict[str, str] = {}) -> None:
    """import_pairs.py with these arguments; what it prints goes to the file `log`."""
    os.environ.update(environment)
    print_to(log)
    sys.argv = ["import_pairs.py", *argv]
    script.main()
