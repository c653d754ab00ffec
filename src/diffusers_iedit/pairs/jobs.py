"""Each stage on one shard: where its rows come from and where they go. The engines run these, in any order."""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features
from transformers import CLIPTokenizer

from ..resuming import replacing
from .caption import CaptionImages, CaptionOptions
from .edit_prompts import EditOptions, EditPrompts
from .embed import EmbedImages, EmbedOptions, EmbedPrompts
from .mask import SegmentTerms, mask_iou, unfit_mask
from .models import ModelStage, load
from .options import MaskOptions, ReadPairsOptions, SegmentOptions, SimilarityOptions
from .read import ReadOptions
from .retrieve import Retrieve, RetrieveOptions
from .schema import FEATURES, same_tokens
from .shards import Marker, read_marker, read_table, write_array, write_marker, write_table


CPU_THREADS = min(8, os.cpu_count() or 1)
"""Threads that decode images and encode masks beside the model."""

ROWS_PER_GROUP = 100
"""Pairs that are read together from a finished file: few, as a pair is large."""


@dataclass
class Options:
    """Everything that the pairs depend on, by stage."""

    read: ReadOptions
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    edit: EditOptions = field(default_factory=EditOptions)
    edit_seed: int = 0
    embed: EmbedOptions = field(default_factory=EmbedOptions)
    retrieve: RetrieveOptions = field(default_factory=RetrieveOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)

    @property
    def pool(self) -> str:
        """The collection that the targets come from."""
        return "source" if self.read.pool is None else "pool"


@dataclass
class ImportOptions:
    """Everything that the pairs of an import depend on, by stage."""

    read: ReadPairsOptions
    caption: CaptionOptions = field(default_factory=CaptionOptions)
    embed: SimilarityOptions = field(default_factory=SimilarityOptions)
    mask: SegmentOptions = field(default_factory=SegmentOptions)


AnyOptions = TypeVar("AnyOptions", Options, ImportOptions)


class Collection:
    """The images of a collection that were kept: those of a shard, or any by their row in the whole collection.

    Args:
        work (`Path`): The build's work folder.
        name (`str`): "source" or "pool".
    """

    def __init__(self, work: Path, name: str):
        self.folder = work / "read" / name
        with np.load(self.folder / "kept.npz") as kept:
            self.kept = {shard: kept[shard] for shard in kept.files}
        self.shards = list(self.kept)
        self.ends = np.cumsum([len(rows) for rows in self.kept.values()])
        # Mapped, not loaded; not all at once, as a process may not open that many files.
        self.table = lru_cache(maxsize=64)(lambda shard: read_table(self.folder / f"{shard}.arrow"))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def first_row(self, shard: str) -> int:
        """The row in the whole collection at which a shard begins."""
        return int(self.ends[self.shards.index(shard)]) - len(self.kept[shard])

    def column(self, shard: str, name: str) -> list:
        """A column of a shard's kept rows."""
        return self.table(shard)[name].take(self.kept[shard]).to_pylist()

    @cached_property
    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of all kept images, ascending, and the rows that have them."""
        hashes = np.concatenate([self.table(shard)["hash"].to_numpy()[rows] for shard, rows in self.kept.items()])
        order = np.argsort(hashes)
        return hashes[order], order

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """The rows in the whole collection of the images with these hashes, -1 for those that are not in it."""
        known, rows = self._by_hash
        places = np.searchsorted(known, hashes).clip(max=len(known) - 1)
        return np.where(known[places] == hashes, rows[places], -1)

    def image(self, row: int) -> bytes:
        """The encoded image at a row of the whole collection."""
        position = int(np.searchsorted(self.ends, row, side="right"))
        shard = self.shards[position]
        kept = self.kept[shard]
        return self.table(shard)["image"][int(kept[row - self.ends[position] + len(kept)])].as_py()


@dataclass
class Job(Generic[AnyOptions]):
    """A stage on one shard. Built twice, a shard comes out the same."""

    work: Path
    options: AnyOptions
    batch_size: int

    # Whether a GPU makes it faster.
    has_model: ClassVar[bool] = False

    def __call__(self, shard: str) -> Iterator[int]:
        """Builds the shard, unless it is there; yields numbers of rows as these are done."""
        file = self.output(shard)
        marker = read_marker(file)
        if marker is not None and self.finished(shard):
            yield marker.rows_in
            return
        self.model_seconds = 0.0
        started = time.perf_counter()
        marker = yield from self.build(shard, file)
        marker.seconds, marker.model_seconds = time.perf_counter() - started, self.model_seconds
        write_marker(file, marker)

    def output(self, shard: str) -> Path:
        """The file that is there when the shard is built."""
        raise NotImplementedError

    def finished(self, shard: str) -> bool:
        """Whether the shard is there, whole."""
        return read_marker(self.output(shard)) is not None

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        """Writes the file; yields numbers of rows as these are done, and returns what is known of the shard."""
        raise NotImplementedError

    @cached_property
    def source(self) -> Collection:
        return Collection(self.work, "source")

    def table(self, stage: str, shard: str) -> pa.Table:
        """What an earlier stage made of the shard."""
        return read_table(self.work / stage / f"{shard}.arrow")

    def predict(self, stage: ModelStage, batches: Iterable[dict]) -> Iterator[dict]:
        """A stage's outputs, in order; other batches are prepared and finished while the model is at work."""
        preparing: deque[Future[dict]] = deque()
        finishing: deque[Future[dict]] = deque()
        with ThreadPoolExecutor(CPU_THREADS) as threads:

            def predict_next() -> None:
                inputs = preparing.popleft().result()
                started = time.perf_counter()
                outputs = stage.predict(inputs)
                self.model_seconds += time.perf_counter() - started
                finishing.append(threads.submit(stage.finish, outputs))

            for batch in batches:
                preparing.append(threads.submit(stage.prepare, batch))
                if len(preparing) > CPU_THREADS:
                    predict_next()
                if len(finishing) > CPU_THREADS:
                    yield finishing.popleft().result()
            while preparing:
                predict_next()
            while finishing:
                yield finishing.popleft().result()

    def batches(self, **columns: list) -> Iterator[dict]:
        """Columns of one length, cut into batches."""
        length = len(next(iter(columns.values())))
        for start in range(0, length, self.batch_size):
            yield {name: column[start : start + self.batch_size] for name, column in columns.items()}


@dataclass
class ReadJob(Job[AnyOptions]):
    """Stage 1 on one file of a collection, a part, which becomes several shards."""

    collection: str
    parts: int

    def output(self, shard: str) -> Path:
        return self.work / "read" / self.collection / f"part-{shard}"

    def finished(self, shard: str) -> bool:
        whole = read_marker(self.output(shard))
        folder = self.work / "read" / self.collection
        return whole is not None and all(read_marker(folder / f"{name}.arrow") for name in whole.shards)

    @cached_property
    def rows_of(self):
        return self.options.read.collections()[self.collection]

    @cached_property
    def stream(self):
        return self.rows_of.open()

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        whole = Marker(rows_in=0, rows_out=0)

        # What an earlier run finished of this part is skipped.
        while marker := read_marker(self._shard_file(shard, whole)):
            yield self._count(whole, self._shard_file(shard, whole), marker)
        if "damaged_file" in whole.dropped:
            # It ended there; read again, it would be counted again.
            return whole
        stream = self.stream.shard(num_shards=self.parts, index=int(shard)).skip(whole.rows_in)

        rows: list[dict] = []
        dropped: Counter[str] = Counter()
        for row in self.rows_of.rows(stream, self.options.read, dropped):
            rows.append(row)
            if len(rows) == self.options.read.shard_size:
                yield self._write(shard, whole, rows, dropped)
                rows = []
                # `read_rows` goes on counting in the same one.
                dropped.clear()
        if rows or dropped:
            yield self._write(shard, whole, rows, dropped)
        return whole

    def _shard_file(self, shard: str, whole: Marker) -> Path:
        return self.work / "read" / self.collection / f"{shard}-{len(whole.shards):04}.arrow"

    def _count(self, whole: Marker, file: Path, marker: Marker) -> int:
        whole.rows_in += marker.rows_in
        whole.rows_out += marker.rows_out
        whole.dropped = dict(Counter(whole.dropped) + Counter(marker.dropped))
        whole.shards.append(file.stem)
        return marker.rows_in

    def _write(self, shard: str, whole: Marker, rows: list[dict], dropped: Counter) -> int:
        file = self._shard_file(shard, whole)
        write_table(file, pa.Table.from_pylist(rows, schema=self.rows_of.schema))
        marker = Marker(rows_in=len(rows) + dropped.total(), rows_out=len(rows), dropped=dict(dropped))
        write_marker(file, marker)
        return self._count(whole, file, marker)


class BuildJob(Job[Options]):
    """A stage of a build, whose targets come from a pool."""

    @cached_property
    def pool(self) -> Collection:
        return self.source if self.options.pool == "source" else Collection(self.work, "pool")


@dataclass
class CaptionJob(Job[AnyOptions]):
    """Stage 2 on one shard of the source."""

    has_model = True

    def output(self, shard: str) -> Path:
        return self.work / "caption" / f"{shard}.arrow"

    @cached_property
    def stage(self) -> CaptionImages:
        return CaptionImages(self.options.caption)

    def captions(self, images: list[bytes]) -> Iterator[list[str]]:
        """BLIP's captions, batch by batch."""
        for output in self.predict(self.stage, self.batches(image=images)):
            yield output["caption"]

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        if self.options.read.caption_column is not None:
            captions = [caption or "" for caption in self.source.column(shard, "caption")]
            yield len(captions)
        else:
            captions = []
            for batch in self.captions(self.source.column(shard, "image")):
                captions += batch
                yield len(batch)
        write_table(file, pa.table({"caption": pa.array(captions, pa.string())}))
        return Marker(len(captions), len(captions))


@dataclass
class EditJob(BuildJob):
    """Stage 3 on one shard of the source. Its rows name the caption they come from by `row`."""

    def output(self, shard: str) -> Path:
        return self.work / "edit" / f"{shard}.arrow"

    @cached_property
    def stage(self) -> EditPrompts:
        return EditPrompts(self.options.edit_seed, self.options.edit)

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        captions = self.table("caption", shard)["caption"].to_pylist()
        # An image keeps its edit wherever it stands in the collection.
        edits = self.stage({"id": [f"{key:016x}" for key in self.source.column(shard, "hash")], "caption": captions})
        rows = [row for row, reason in enumerate(edits["dropped"]) if reason is None]
        columns = {"row": rows, "source_caption": [captions[row] for row in rows]}
        columns |= {name: [edits[name][row] for row in rows] for name in ("edit_prompt", "source_term", "target_term")}
        schema = pa.schema({name: pa.int64() if name == "row" else pa.string() for name in columns})
        write_table(file, pa.table(columns, schema=schema))
        yield len(captions)
        return Marker(len(captions), len(rows), dict(Counter(filter(None, edits["dropped"]))))


@dataclass
class EmbedJob(BuildJob):
    """Stage 4 on one shard of what is to be embedded."""

    has_model = True

    @cached_property
    def stage(self) -> EmbedImages | EmbedPrompts:
        raise NotImplementedError

    def rows(self, shard: str) -> dict[str, list]:
        """The stage's input: its column."""
        raise NotImplementedError

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        parts = [np.empty((0, self.stage.dim), np.float16)]
        for output in self.predict(self.stage, self.batches(**self.rows(shard))):
            parts.append(output["embeds"])
            yield len(output["embeds"])
        embeds = np.concatenate(parts)
        write_array(file, embeds)
        return Marker(len(embeds), len(embeds))


@dataclass
class EmbedImagesJob(EmbedJob):
    """Stage 4 on one shard of the pool, or on those images of a separate source that have an edit."""

    collection: str

    def output(self, shard: str) -> Path:
        return self.work / "embed" / self.collection / f"{shard}.npy"

    @cached_property
    def stage(self) -> EmbedImages:
        return EmbedImages(self.options.embed)

    def rows(self, shard: str) -> dict[str, list]:
        if self.collection == self.options.pool:
            return {"image": self.pool.column(shard, "image")}
        images = self.source.column(shard, "image")
        return {"image": [images[row] for row in self.table("edit", shard)["row"].to_pylist()]}


@dataclass
class EmbedPromptsJob(EmbedJob):
    """Stage 4 on the edit prompts of one shard of the source."""

    def output(self, shard: str) -> Path:
        return self.work / "embed" / "prompt" / f"{shard}.npy"

    @cached_property
    def stage(self) -> EmbedPrompts:
        return EmbedPrompts(self.options.embed)

    def rows(self, shard: str) -> dict[str, list]:
        return {"edit_prompt": self.table("edit", shard)["edit_prompt"].to_pylist()}


@dataclass
class RetrieveJob(BuildJob):
    """Stage 5 on one shard of the source: the nearest images of the pool for each row of the edit stage."""

    index_file: Path | None

    def output(self, shard: str) -> Path:
        return self.work / "retrieve" / f"{shard}.arrow"

    @cached_property
    def stage(self) -> Retrieve:
        files = [self.work / "embed" / self.options.pool / f"{shard}.npy" for shard in self.pool.shards]
        options = self.options.retrieve
        return Retrieve(
            files,
            self.index_file,
            text_weight=options.text_weight,
            num_candidates=options.num_candidates,
            min_similarity=options.min_similarity,
            max_source_similarity=options.max_source_similarity,
        )

    def queries(self, shard: str) -> dict[str, np.ndarray]:
        """What the shard's edits are searched with."""
        rows = self.table("edit", shard)["row"].to_numpy()
        image_embeds = np.load(self.work / "embed" / "source" / f"{shard}.npy")
        if self.options.pool == "source":
            image_embeds = image_embeds[rows]
            pool_rows = rows + self.source.first_row(shard)
        else:
            # A part of the pool may serve as source: the same images are then in both.
            hashes = self.source.table(shard)["hash"].to_numpy()
            pool_rows = self.pool.find(hashes[self.source.kept[shard]][rows])
        prompt_embeds = np.load(self.work / "embed" / "prompt" / f"{shard}.npy")
        return {"image_embeds": image_embeds, "prompt_embeds": prompt_embeds, "pool_row": pool_rows}

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return load(CLIPTokenizer, self.options.embed.clip_model, "clip")

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        found = self.stage(self.queries(shard))
        texts = self.table("edit", shard).select(["source_caption", "edit_prompt"]).to_pylist()
        # Of such edits the model that is trained sees no more than CLIP did: nothing.
        cut_off = np.array([same_tokens(self.tokenizer, *edit.values()) for edit in texts], dtype=bool)
        targets = np.where(cut_off[:, None], -1, found["targets"])
        columns = {
            "targets": pa.array(list(targets), pa.list_(pa.int64())),
            "similarities": pa.array(list(found["similarities"]), pa.list_(pa.float32())),
        }
        write_table(file, pa.table(columns))
        edits = len(targets)
        yield edits
        found_some = int((targets[:, 0] >= 0).sum())
        dropped = {"edit_cut_off": int(cut_off.sum()), "no_neighbour": edits - found_some - int(cut_off.sum())}
        return Marker(edits, found_some, {reason: count for reason, count in dropped.items() if count})


@dataclass
class SegmentJob(Job[AnyOptions]):
    """Stage 6 on one shard of the source."""

    has_model = True

    def output(self, shard: str) -> Path:
        return self.work / "mask" / f"{shard}.arrow"

    @cached_property
    def stage(self) -> SegmentTerms:
        return SegmentTerms(self.options.mask)

    def masks(self, images: Iterable[bytes], terms: list[str]) -> tuple[list[bytes], list[np.ndarray]]:
        images = iter(images)
        batches = (
            {"image": [next(images) for _ in batch["term"]], "term": batch["term"]}
            for batch in self.batches(term=terms)
        )
        outputs = list(self.predict(self.stage, batches))
        masks, grids = ([value for output in outputs for value in output[name]] for name in ("mask", "grid"))
        return masks, grids


@dataclass
class MaskJob(SegmentJob[Options], BuildJob):
    """Stage 6 of a build: a row for each candidate that passes, the best of a source first."""

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        options = self.options.mask
        edits, found = self.table("edit", shard), self.table("retrieve", shard)
        assigned = None if options.rerank_by_mask else np.load(self.work / "retrieve" / "assigned.npz")[shard]
        candidates = []
        for row, targets in enumerate(found["targets"].to_pylist()):
            places = range(len(targets)) if assigned is None else [assigned[row]]
            candidates.append([place for place in places if place >= 0 and targets[place] >= 0])
        rows = [row for row, places in enumerate(candidates) if places]

        dropped: Counter[str] = Counter()
        images = self.source.column(shard, "image")
        numbers, source_terms = edits["row"].to_pylist(), edits["source_term"].to_pylist()
        source_masks, source_grids = self.masks(
            (images[numbers[row]] for row in rows), [source_terms[row] for row in rows]
        )
        fit = []
        for row, mask, grid in zip(rows, source_masks, source_grids, strict=True):
            if reason := unfit_mask(grid, options):
                dropped[f"source_mask_{reason}"] += 1
            else:
                fit.append((row, mask, grid))

        targets, similarities = found["targets"].to_pylist(), found["similarities"].to_pylist()
        target_terms = edits["target_term"].to_pylist()
        wanted = [(row, place) for row, _, _ in fit for place in candidates[row]]
        target_masks, target_grids = self.masks(
            (self.pool.image(targets[row][place]) for row, place in wanted), [target_terms[row] for row, _ in wanted]
        )
        target_of = dict(zip(wanted, zip(target_masks, target_grids, strict=True), strict=True))
        kept = []
        for row, source_mask, source_grid in fit:
            passed, reasons = [], []
            for place in candidates[row]:
                target_mask, target_grid = target_of[row, place]
                iou = mask_iou(source_grid, target_grid)
                if reason := unfit_mask(target_grid, options):
                    reasons.append(f"target_mask_{reason}")
                elif iou < options.min_mask_iou:
                    reasons.append("masks_apart")
                else:
                    passed.append(
                        {
                            "row": row,
                            "target": targets[row][place],
                            "similarity": similarities[row][place],
                            "source_mask": source_mask,
                            "target_mask": target_mask,
                            "iou": iou,
                        }
                    )
            if not passed:
                dropped[reasons[0]] += 1
            # The sort keeps the neighbours' order where masks overlap alike.
            kept += sorted(passed, key=lambda pair: -pair["iou"]) if options.rerank_by_mask else passed
        schema = pa.schema(
            {
                "row": pa.int64(),
                "target": pa.int64(),
                "similarity": pa.float32(),
                "source_mask": pa.large_binary(),
                "target_mask": pa.large_binary(),
                "iou": pa.float32(),
            }
        )
        write_table(file, pa.Table.from_pylist(kept, schema=schema))
        yield len(rows)
        return Marker(len(rows), len({pair["row"] for pair in kept}), dict(dropped))


@dataclass
class WriteSetJob(Job[AnyOptions]):
    """The last stage on a group of shards of the source, which become one parquet file."""

    groups: dict[str, list[str]]

    def output(self, shard: str) -> Path:
        return self.work / "write" / f"train-{shard}-of-{len(self.groups):05}.parquet"

    @property
    def features(self) -> Features:
        """The columns of the set."""
        return FEATURES

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        rows, schema = 0, self.features.arrow_schema
        pairs = (pair for source_shard in self.groups[shard] for pair in self.pairs(source_shard))
        with replacing(file) as partial, pq.ParquetWriter(partial, schema) as out:
            while some := list(islice(pairs, ROWS_PER_GROUP)):
                out.write_table(pa.Table.from_pylist(some, schema=schema))
                rows += len(some)
                yield len(some)
        return Marker(rows, rows)

    def pairs(self, shard: str) -> Iterator[dict]:
        """The finished rows of a shard of the source."""
        raise NotImplementedError


@dataclass
class WriteJob(WriteSetJob[Options], BuildJob):
    """Stage 7 of a build."""

    def pairs(self, shard: str) -> Iterator[dict]:
        edits, images = self.table("edit", shard).to_pylist(), self.source.column(shard, "image")
        masks = self.table("mask", shard)
        if self.options.mask.rerank_by_mask:
            masks = masks.take(np.load(self.work / "mask" / "assigned.npz")[shard])
        for pair in masks.to_pylist():
            edit = edits[pair["row"]]
            yield {
                "source_image": {"bytes": images[edit["row"]], "path": None},
                "target_image": {"bytes": self.pool.image(pair["target"]), "path": None},
                "source_caption": edit["source_caption"],
                "edit_prompt": edit["edit_prompt"],
                "source_term": edit["source_term"],
                "target_term": edit["target_term"],
                "source_mask": {"bytes": pair["source_mask"], "path": None},
                "target_mask": {"bytes": pair["target_mask"], "path": None},
                "similarity": pair["similarity"],
            }
