"""Small sets of pairs for the tests of the builder, and processes to build them in that are quick to start."""

import io
import multiprocessing
import os
import sys
from dataclasses import fields, replace
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accidents import killed_at, print_to
from datasets import Dataset, Features, Image, Value

from diffusers_iedit import mini
from diffusers_iedit.pairs import build as builder
from diffusers_iedit.pairs.caption import CaptionOptions
from diffusers_iedit.pairs.edit_prompts import EditOptions
from diffusers_iedit.pairs.embed import EmbedOptions
from diffusers_iedit.pairs.jobs import Options
from diffusers_iedit.pairs.options import MaskOptions
from diffusers_iedit.pairs.read import ReadOptions
from diffusers_iedit.pairs.retrieve import RetrieveOptions


sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import build_dataset


WORDS = [*mini.NOUNS, *mini.COLOURS]

COUNT, SHARD_SIZE = 36, 12

# With these the masks rule no pair out.
ANY_MASK = {"mask_threshold": 0.0, "max_mask_area": 1.0}


def write_pool(folder: Path, seeds: range, captions: list[str] | None = None) -> Path:
    """A collection of pictures of the mini world, columns `image` and `text`, in one Parquet file."""
    scenes = [mini.render(seed) for seed in seeds]
    images = []
    for scene in scenes:
        file = io.BytesIO()
        scene.image.save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
    texts = captions or [scene.caption for scene in scenes]
    features = Features({"image": Image(), "text": Value("string")})
    folder.mkdir(parents=True)
    Dataset.from_dict({"image": images, "text": texts}, features=features).to_parquet(folder / "train.parquet")
    return folder


def options(source: Path, **changes) -> Options:
    """Options for the mini models; `changes` are given by their names, whatever their stage."""
    base = Options(
        ReadOptions(source=str(source), shard_size=SHARD_SIZE),
        CaptionOptions(caption_model="mini"),
        EditOptions(vocabulary=frozenset(WORDS), max_hypernym_levels=8),
        0,
        EmbedOptions(clip_model="mini"),
        RetrieveOptions(text_weight=0.65),
        MaskOptions(mask_model="mini"),
    )
    for stage in ("read", "caption", "edit", "embed", "retrieve", "mask"):
        known = {field.name for field in fields(getattr(base, stage))}
        chosen = {name: changes.pop(name) for name in known & changes.keys()}
        setattr(base, stage, replace(getattr(base, stage), **chosen))
    assert not changes
    return base


def arguments(source: Path, output_dir: Path, *others: str) -> list[str]:
    """The command line that `options` stands for."""
    return [
        *("--source", str(source), "--output_dir", str(output_dir), "--shard_size", str(SHARD_SIZE)),
        *("--caption_model", "mini", "--clip_model", "mini", "--mask_model", "mini", "--text_weight", "0.65"),
        *("--max_hypernym_levels", "8", "--vocabulary", *WORDS, *others),
    ]


def build(output_dir: Path, chosen: Options, **how) -> dict:
    """`build`, with several files in a small set, and on one thread: with more, sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(builder, "ROWS_PER_FILE", 4):
            return builder.build(output_dir, chosen, **how)
    finally:
        torch.set_num_threads(threads)


def rows(output_dir: Path) -> pa.Table:
    """All rows of a finished set, in order."""
    return pa.concat_tables(pq.read_table(file) for file in sorted((output_dir / "data").iterdir()))


def processes():
    """A context for processes that begin with all modules imported, and nothing used of them yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_build"])
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        multiprocessing.forkserver.ensure_running()
    return context


def build_and_die(output_dir: Path, chosen: Options, part: str, number: int) -> None:
    """Is killed when the `number`-th file below a folder `part` is to get its name."""
    with killed_at(part, number):
        build(output_dir, chosen)


def build_and_wait(output_dir: Path, chosen: Options, waiting, go_on) -> None:
    """Builds, but waits in the middle."""
    replace_file = os.replace

    def slow(source, target):
        if "embed" in Path(target).parts:
            waiting.set()
            go_on.wait()
        replace_file(source, target)

    with mock.patch("os.replace", slow):
        build(output_dir, chosen)


def command(argv: list[str], log: Path, environment: dict[str, str] = {}) -> None:
    """build_dataset.py with these arguments; what it prints goes to the file `log`."""
    os.environ.update(environment)
    print_to(log)
    sys.argv = ["build_dataset.py", *argv]
    build_dataset.main()
