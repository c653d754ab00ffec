"""The import of sets with pictures before and after an edit, by the builder's stages."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Features, Value
from huggingface_hub import DatasetCard
from transformers import CLIPTokenizer

from ..engines import LocalEngine, RayEngine
from ..images import open_image
from ..masking_iedit import difference_term
from .build import Runner, carry_out, describe, reading, summed
from .columns import is_instruction
from .embed import EmbedImages, EmbedPrompts
from .jobs import CPU_THREADS, CaptionJob, Collection, ImportOptions, Job, SegmentJob, WriteSetJob
from .mask import GRID, mask_iou, unfit_mask
from .masks import difference_mask, same_aspect, to_image
from .models import load
from .options import IMPORT_STAGES, SegmentOptions
from .retrieve import query_embeddings
from .schema import FEATURES, INSTRUCTION, same_tokens
from .shards import Marker, read_table, write_table
from .write import imported_card


MIN_SHARE_INSIDE = 0.5
"""How much of what differs between two pictures has to lie in the set's mask: else it is that of something else."""


def import_pairs(
    output_dir: str | os.PathLike,
    options: ImportOptions,
    engine: LocalEngine | RayEngine | None = None,
    batch_size: int = 16,
    redo: str | None = None,
    license_note: str = "As those of the set they come from.",
) -> dict:
    """Imports a set of edits, or goes on with an import that was stopped.

    What the set lacks is filled in: captions of either picture by BLIP, terms by the words in which they differ, masks
    by what differs between the pictures, or by CLIPSeg where these do not show one frame.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the pairs, as of [`~diffusers_iedit.pairs.build.build`].
        options (`ImportOptions`): Everything that the pairs depend on.
        engine (`LocalEngine` or `RayEngine`, *optional*): Who does the work; by default this process.
        batch_size (`int`): Images that a model looks at together.
        redo (`str`, *optional*): Do this stage and all later ones again, with new options for them.
        license_note (`str`): Under what terms the images may be used, for the card.

    Returns:
        `dict`: The report: rows in and out, what was dropped by reason, where the masks are from, which column held
        what, and seconds of work.

    Raises:
        ValueError: If the set or a model cannot be opened, if it is not clear what a column holds, or if the folder
            was begun with other options or holds something else.
        RuntimeError: If another process is at work on the folder, or if no pair is left.
    """
    return carry_out(Importer, output_dir, options, engine, batch_size, redo, license_note)


@dataclass
class CaptionPairsJob(CaptionJob[ImportOptions]):
    """Stage 2 on one shard: what is seen before and after the edit, from the set or by BLIP."""

    from_set: dict[str, bool]

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        columns = {}
        for role, picture in (("caption", "image"), ("prompt", "target")):
            if self.from_set[role]:
                columns[role] = self.source.column(shard, role)
            else:
                columns[role] = []
                for batch in self.captions(self.source.column(shard, picture)):
                    columns[role] += batch
        rows = len(columns["caption"])
        yield rows
        write_table(file, pa.table({role: pa.array(texts, pa.string()) for role, texts in columns.items()}))
        return Marker(rows, rows)


@dataclass
class DifferJob(Job[ImportOptions]):
    """Stage 3 on one shard: the words in which both captions differ. Rows without any are left out."""

    def output(self, shard: str) -> Path:
        return self.work / "edit" / f"{shard}.arrow"

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return load(CLIPTokenizer, self.options.embed.clip_model, "clip")

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        rows = self.table("caption", shard).to_pylist()
        dropped: Counter[str] = Counter()
        edits = []
        for number, row in enumerate(rows):
            caption, prompt = (row["caption"] or "").strip(), (row["prompt"] or "").strip()
            terms = difference_term(caption, prompt), difference_term(prompt, caption)
            if not caption or not prompt:
                dropped["no_caption" if not caption else "no_prompt"] += 1
            elif caption.split() == prompt.split():
                dropped["same_captions"] += 1
            elif not all(terms):
                dropped["no_term"] += 1
            elif same_tokens(self.tokenizer, caption, prompt):
                dropped["edit_cut_off"] += 1
            else:
                edits.append(
                    {
                        "row": number,
                        "source_caption": caption,
                        "edit_prompt": prompt,
                        "source_term": terms[0],
                        "target_term": terms[1],
                    }
                )
        names = ("row", "source_caption", "edit_prompt", "source_term", "target_term")
        schema = pa.schema({name: pa.int64() if name == "row" else pa.string() for name in names})
        write_table(file, pa.Table.from_pylist(edits, schema=schema))
        yield len(rows)
        return Marker(len(rows), len(edits), dict(dropped))


@dataclass
class SimilarityJob(Job[ImportOptions]):
    """Stage 4 on one shard: the cosine that retrieval would have found each target by (Sec. 3.1)."""

    has_model = True

    def output(self, shard: str) -> Path:
        return self.work / "embed" / f"{shard}.arrow"

    @cached_property
    def images(self) -> EmbedImages:
        return EmbedImages(self.options.embed)

    @cached_property
    def prompts(self) -> EmbedPrompts:
        return EmbedPrompts(self.options.embed)

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        edits = self.table("edit", shard)
        rows = edits["row"].to_pylist()
        embeds = []
        for column in ("image", "target"):
            pictures = self.source.column(shard, column)
            batches = self.batches(image=[pictures[row] for row in rows])
            embeds.append([output["embeds"] for output in self.predict(self.images, batches)])
        batches = self.batches(edit_prompt=edits["edit_prompt"].to_pylist())
        embeds.append([output["embeds"] for output in self.predict(self.prompts, batches)])
        similarities = np.empty(0, np.float32)
        if rows:
            sources, targets, prompts = (np.concatenate(parts) for parts in embeds)
            similarities = np.vecdot(query_embeddings(sources, prompts), query_embeddings(targets, targets))
        write_table(file, pa.table({"similarity": pa.array(similarities, pa.float32())}))
        yield len(rows)
        return Marker(len(rows), len(rows))


@dataclass(frozen=True)
class FoundMasks:
    """The masks of a pair, PNG files, as far as there are any without a model; and where they are from.

    Args:
        origin (`str`): "set", "difference", or "clipseg", which has still to find what is missing.
        source, target (`bytes`, *optional*): M_1 and M_2.
        dropped (`str`, *optional*): Why the pair is left out.
    """

    origin: str
    source: bytes | None = None
    target: bytes | None = None
    dropped: str | None = None


def find_masks(image: bytes, target: bytes, mask: bytes | None, options: SegmentOptions) -> FoundMasks:
    """Where a pair differs, without a model: by the set's mask, else by the pictures if they show one frame.

    The edit of such a pair is in both at one place, so both masks are that place: of the target, what only the old
    thing covered has changed, too. A mask that marks nothing or everything says nothing.
    """
    before, after = (open_image(file).convert("RGB") for file in (image, target))
    marked = None if mask is None else np.asarray(open_image(mask)) > 127
    if marked is not None and unfit_mask(_grid(marked), options):
        marked = None
    if not same_aspect(before.size, after.size):
        return FoundMasks("clipseg") if marked is None else FoundMasks("set", mask)
    differs = difference_mask(before, after)
    if marked is not None:
        elsewhere = (differs & marked).sum() < MIN_SHARE_INSIDE * differs.sum()
        dropped = "mask_elsewhere" if elsewhere else None
        return FoundMasks("set", _png(marked, before.size), _png(marked, after.size), dropped)
    if unfit_mask(_grid(differs), options):
        return FoundMasks("clipseg")
    return FoundMasks("difference", _png(differs, before.size), _png(differs, after.size))


def _grid(mask: np.ndarray) -> np.ndarray:
    """A mask on the grid on which masks are compared, (GRID, GRID)."""
    return np.asarray(to_image(mask, (GRID, GRID))) > 0


def _png(mask: np.ndarray, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    to_image(mask, size).save(file, "PNG")
    return file.getvalue()


@dataclass
class PairMaskJob(SegmentJob[ImportOptions]):
    """Stage 5 on one shard: the masks from the set, from what differs, or by CLIPSeg on the terms."""

    def build(self, shard: str, file: Path) -> Generator[int, None, Marker]:
        options = self.options.mask
        edits = self.table("edit", shard).to_pylist()
        columns = {name: self.source.column(shard, name) for name in ("image", "target", "mask")}
        places = [{name: column[edit["row"]] for name, column in columns.items()} for edit in edits]
        with ThreadPoolExecutor(CPU_THREADS) as threads:
            found = list(threads.map(lambda pair: find_masks(**pair, options=options), places))

        # What is still missing, CLIPSeg looks for.
        masks = {}
        for side, picture in (("source", "image"), ("target", "target")):
            masks[side] = [getattr(pair, side) for pair in found]
            wanted = [n for n, pair in enumerate(found) if masks[side][n] is None and pair.dropped is None]
            if wanted:
                terms = [edits[number][f"{side}_term"] for number in wanted]
                for number, mask in zip(
                    wanted, self.masks((places[n][picture] for n in wanted), terms)[0], strict=True
                ):
                    masks[side][number] = mask

        dropped: Counter[str] = Counter()
        kept = []
        for number, pair in enumerate(found):
            if reason := pair.dropped or self.unfit(masks["source"][number], masks["target"][number]):
                dropped[reason] += 1
            else:
                row = {"edit": number, "origin": pair.origin}
                kept.append(row | {f"{side}_mask": files[number] for side, files in masks.items()})
        schema = {"edit": pa.int64(), "origin": pa.string()}
        schema |= dict.fromkeys(("source_mask", "target_mask"), pa.large_binary())
        write_table(file, pa.Table.from_pylist(kept, schema=pa.schema(schema)))
        yield len(edits)
        return Marker(len(edits), len(kept), dict(dropped))

    def unfit(self, source_mask: bytes, target_mask: bytes) -> str | None:
        """Why these masks rule out their pair."""
        options = self.options.mask
        grids = {
            side: _grid(np.asarray(open_image(mask)) > 127)
            for side, mask in (("source", source_mask), ("target", target_mask))
        }
        for side, grid in grids.items():
            if reason := unfit_mask(grid, options):
                return f"{side}_mask_{reason}"
        return "masks_apart" if mask_iou(grids["source"], grids["target"]) < options.min_mask_iou else None


@dataclass
class WritePairsJob(WriteSetJob[ImportOptions]):
    """Stage 6 on a group of shards."""

    has_instructions: bool

    @property
    def features(self) -> Features:
        return imported_features(self.options, self.has_instructions)

    def pairs(self, shard: str) -> Iterator[dict]:
        edits = self.table("edit", shard).to_pylist()
        columns = {name: self.source.column(shard, name) for name in ("image", "target", INSTRUCTION)}
        similarities = None
        if self.options.embed.similarity:
            similarities = self.table("embed", shard)["similarity"].to_pylist()
        for masks in self.table("mask", shard).to_pylist():
            edit = edits[masks["edit"]]
            row = edit.pop("row")
            pair = edit | {
                f"{side}_mask": {"bytes": masks[f"{side}_mask"], "path": None} for side in ("source", "target")
            }
            pair |= {
                f"{side}_image": {"bytes": columns[name][row], "path": None}
                for side, name in (("source", "image"), ("target", "target"))
            }
            if similarities is not None:
                pair["similarity"] = similarities[masks["edit"]]
            yield pair | ({INSTRUCTION: columns[INSTRUCTION][row]} if self.has_instructions else {})


def imported_features(options: ImportOptions, has_instructions: bool) -> Features:
    """The columns of an imported set."""
    features = {name: kind for name, kind in FEATURES.items() if name != "similarity" or options.embed.similarity}
    return Features(features | ({INSTRUCTION: Value("string")} if has_instructions else {}))


class Importer(Runner[ImportOptions]):
    """The stages of an import."""

    name = "an import"
    stages = IMPORT_STAGES

    def __init__(self, work: Path, options: ImportOptions, engine: LocalEngine | RayEngine, batch_size: int):
        super().__init__(work, options, engine, batch_size)
        # What the set has, by role.
        self.columns: dict[str, str] = {}

    @staticmethod
    def describe(options: ImportOptions) -> dict:
        columns = options.read.collections()["source"].find_columns()
        return describe(options, IMPORT_STAGES, captions=not {"caption", "prompt"} <= columns.keys())

    def run(self) -> list[Path]:
        self.columns = self.options.read.collections()["source"].find_columns()
        self.read("source", self.count_parts("source"))
        source = Collection(self.work, "source")
        if self.engine.is_main:
            self.check_prompts(source)
        self.engine.wait()
        rows = {shard: len(kept) for shard, kept in source.kept.items()}
        from_set = {role: role in self.columns for role in ("caption", "prompt")}
        self.stage("caption", self.job(CaptionPairsJob, from_set=from_set), rows)
        self.stage("edit", self.job(DifferJob), rows)
        edits = {shard: self.marker("edit", shard).rows_out for shard in rows}
        if self.options.embed.similarity:
            self.stage("embed", self.job(SimilarityJob), edits)
        self.stage("mask", self.job(PairMaskJob), edits)
        pairs = {shard: self.marker("mask", shard).rows_out for shard in rows}
        return self.write(WritePairsJob, pairs, has_instructions=INSTRUCTION in self.columns)

    def check_prompts(self, source: Collection) -> None:
        """Raises `ValueError` if what should be captions of the second pictures are commands."""
        prompts = [prompt or "" for prompt in source.column(source.shards[0], "prompt")]
        commands = [prompt for prompt in prompts if is_instruction(prompt)]
        if len(commands) > len(prompts) / 2:
            raise ValueError(
                f"`prompt_column` {self.columns['prompt']!r} holds instructions, such as {commands[0]!r}, but has"
                " to hold captions of the pictures after the edit: pass it as `instruction_column`."
            )

    def report(self, files: list[Path]) -> dict:
        source = Collection(self.work, "source")
        stages = {"read": reading(self.work, "source")}
        for stage in self.stages[1:-1]:
            if stage != "embed" or self.options.embed.similarity:
                stages[stage] = summed([self.work / stage / f"{shard}.arrow" for shard in source.shards])
        stages["write"] = summed(files)
        dropped = sum((Counter(numbers["dropped"]) for numbers in stages.values()), Counter())
        masks: Counter[str] = Counter()
        for shard in source.shards:
            masks.update(read_table(self.work / "mask" / f"{shard}.arrow")["origin"].to_pylist())
        return {
            "rows_in": stages["read"]["rows_in"],
            "rows_out": stages["write"]["rows_out"],
            "dropped": dict(dropped.most_common()),
            "masks": dict(masks.most_common()),
            "columns": self.columns,
            "seconds": round(sum(numbers["seconds"] for numbers in stages.values()), 2),
            "stages": stages,
        }

    def card(self, report: dict, manifest: dict, license_note: str) -> DatasetCard:
        return imported_card(
            report, manifest, license_note, imported_features(self.options, INSTRUCTION in self.columns)
        )

    def hint(self, dropped: dict[str, int]) -> str:
        if dropped.get("mask_elsewhere", 0) > sum(dropped.values()) / 2:
            return (
                " What changes lies outside the masks: if something else marks the edit in them, say so by"
                " `mask_convention`."
            )
        return ""
