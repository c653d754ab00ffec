"""The builder: its seven stages in order, each resumable, on either engine; and what an import shares with it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar, Generic

import numpy as np
from huggingface_hub import DatasetCard, HfApi
from tqdm.auto import tqdm

from ..engines import LocalEngine, RayEngine
from ..resuming import lock_folder, replacing
from . import models
from .edit_prompts import describe_data
from .jobs import (
    AnyOptions,
    CaptionJob,
    Collection,
    EditJob,
    EmbedImagesJob,
    EmbedPromptsJob,
    ImportOptions,
    Job,
    MaskJob,
    Options,
    ReadJob,
    RetrieveJob,
    WriteJob,
    WriteSetJob,
)
from .options import STAGES
from .read import Collection as CollectionOptions
from .read import first_occurrences
from .retrieve import EXACT_LIMIT, Embeddings, assign_targets, build_index
from .sets import PairCollection
from .shards import Marker, read_marker, read_table, write_marker
from .write import dataset_card, picture_sheet


ROWS_PER_FILE = 1000


def build(
    output_dir: str | os.PathLike,
    options: Options,
    engine: LocalEngine | RayEngine | None = None,
    batch_size: int = 16,
    redo: str | None = None,
    license_note: str = "Not stated. The images belong to their owners.",
) -> dict:
    """Builds a set of pairs (Sec. 3.1), or goes on with one that was stopped.

    Args:
        output_dir (`str` or `os.PathLike`): Folder of the set: `data/`, README.md, sheet.jpg, report.json, and `work/`
            with what the stages leave, which a finished set does not need.
        options (`Options`): Everything that the pairs depend on.
        engine (`LocalEngine` or `RayEngine`, *optional*): Who does the work; by default this process.
        batch_size (`int`): Images that a model looks at together.
        redo (`str`, *optional*): Build this stage and all later ones again, with new options for them.
        license_note (`str`): Under what terms the source images may be used, for the card.

    Returns:
        `dict`: The report: rows in and out, what was dropped by reason, and seconds of work, in all and by stage.

    Raises:
        ValueError: If a source or a model cannot be opened, or if the folder was begun with other options or holds
            something else.
        RuntimeError: If another build is at work on the folder, or if no pair is left.
    """
    return carry_out(Builder, output_dir, options, engine, batch_size, redo, license_note)


def carry_out(
    kind: type[Runner[AnyOptions]],
    output_dir: str | os.PathLike,
    options: AnyOptions,
    engine: LocalEngine | RayEngine | None,
    batch_size: int,
    redo: str | None,
    license_note: str,
) -> dict:
    """A build, or an import: see `build`."""
    engine = engine or LocalEngine()
    # Workers may run in another folder.
    output_dir = Path(output_dir).resolve()
    if redo is not None and redo not in kind.stages:
        raise ValueError(f"`redo` has to be one of {', '.join(kind.stages)}, but is {redo!r}.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be at least 1, but is {batch_size}.")
    with _claimed(output_dir, options, kind.name) if engine.is_main else nullcontext():
        if engine.is_main:
            # As a later run finds it: lists for sets.
            manifest = json.loads(json.dumps(kind.describe(options), default=sorted))
            _begin(output_dir, manifest, redo, kind)
        engine.wait()
        if not is_finished(output_dir):
            options = _at_pinned_commits(options, json.loads((output_dir / "manifest.json").read_text()))
            runner = kind(output_dir / "work", options, engine, batch_size)
            files = runner.run()
            if engine.is_main:
                _publish(output_dir, runner, files, manifest, license_note)
        engine.wait()
        return json.loads((output_dir / "report.json").read_text())


def is_finished(output_dir: Path) -> bool:
    """Whether a folder holds a set that is complete: a report, and the files it lists in their full size."""
    file = output_dir / "report.json"
    if not file.exists():
        return False
    files = json.loads(file.read_text())["files"]
    return all(
        (output_dir / name).exists() and (output_dir / name).stat().st_size == size for name, size in files.items()
    )


def describe(options: Options | ImportOptions, stages: tuple[str, ...], captions: bool) -> dict:
    """The options of every stage, and which versions of inputs and models they mean; `captions`: BLIP's too."""
    manifest = {stage: asdict(getattr(options, stage)) if hasattr(options, stage) else {} for stage in stages[:-1]}
    for name, collection in options.read.collections().items():
        # It says more than the name of a branch, which may move.
        del manifest["read"][f"{name}_revision"]
        manifest["read"][f"{name}_fingerprint"] = _input_fingerprint(collection)
    if captions:
        manifest["caption"]["caption_model_fingerprint"] = models.fingerprint(
            options.caption.caption_model, "captioner"
        )
    manifest["embed"]["clip_model_fingerprint"] = models.fingerprint(options.embed.clip_model, "clip")
    manifest["mask"]["mask_model_fingerprint"] = models.fingerprint(options.mask.mask_model, "mask_model")
    return manifest


def _at_pinned_commits(options: AnyOptions, manifest: dict) -> AnyOptions:
    """The options with the commits of Hub data sets that the build was begun with: a branch may move meanwhile."""
    fingerprints = {name: manifest["read"][f"{name}_fingerprint"] for name in options.read.collections()}
    revisions = {
        f"{name}_revision": fingerprint.removeprefix("commit ")
        for name, fingerprint in fingerprints.items()
        if fingerprint.startswith("commit ")
    }
    return replace(options, read=replace(options.read, **revisions))


def _input_fingerprint(collection: CollectionOptions | PairCollection) -> str:
    path = Path(collection.path)
    if not path.exists():
        try:
            sha = HfApi().dataset_info(collection.path, revision=collection.revision).sha
        except Exception as error:
            raise ValueError(
                f"`{collection.argument}` {collection.path!r} is neither a file, a folder nor a data set of the Hub:"
                f" {error}"
            ) from error
        return f"commit {sha}"
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            size = file.stat().st_size
            name = file.relative_to(path).as_posix()
            # Both ends stand for the rest: collections are too large to be read twice.
            with file.open("rb") as opened:
                head = opened.read(4096)
                opened.seek(max(size - 4096, 0))
                digest.update(f"{name} {size} ".encode() + head + opened.read())
    return f"sha256 {digest.hexdigest()[:16]}"


@contextmanager
def _claimed(output_dir: Path, options: Options | ImportOptions, name: str) -> Iterator[None]:
    """Keeps a folder for this build or import, if it is one to build in."""
    if not output_dir.is_dir():
        try:
            output_dir.mkdir(parents=True)
        except OSError as error:
            raise ValueError(
                f"`output_dir` has to be a folder that can be written to, got {output_dir}: {error}"
            ) from error
    # A build that was killed at once leaves no more than part of its manifest.
    elif (
        any(not file.name.startswith("manifest.json") for file in output_dir.glob("[!.]*"))
        and not (output_dir / "manifest.json").exists()
    ):
        raise ValueError(
            f"`output_dir` has to be new, empty or {name} that was begun, but {output_dir} holds other files."
        )
    for collection in options.read.collections().values():
        if output_dir.is_relative_to(Path(collection.path).resolve()):
            raise ValueError(
                f"`output_dir` {output_dir} lies in `{collection.argument}` {collection.path!r}, which would then hold"
                " what is built from it."
            )
    with lock_folder(output_dir, name.split()[1]):
        yield


def _begin(output_dir: Path, manifest: dict, redo: str | None, kind: type[Runner]) -> None:
    """Pins the options of a new run, or checks that they are those of the one to go on with."""
    file = output_dir / "manifest.json"
    begun = json.loads(file.read_text()) if file.exists() else None
    if begun is not None:
        if begun.keys() != manifest.keys():
            raise ValueError(
                f"{output_dir} does not hold {kind.name}: its manifest has the stages {', '.join(begun)}."
            )
        for stage in kind.stages[:-1] if redo is None else kind.stages[: kind.stages.index(redo)]:
            # The names that stand in both, in order, and then those of another version of this package.
            for name in [*manifest[stage], *(begun[stage].keys() - manifest[stage])]:
                old, new = begun[stage].get(name), manifest[stage].get(name)
                if old != new:
                    raise ValueError(
                        f"{output_dir} was begun with `{name}` = {old!r}, but now it is {new!r}. Choose another"
                        f" folder, or redo the {kind.name.split()[1]} from stage {stage} on (`--redo {stage}`)."
                    )
    # What a process left that was killed while it wrote. Nobody else is at work here.
    for partial in output_dir.rglob("*.partial"):
        partial.unlink(missing_ok=True)
    if redo is not None:
        # The set that was built before stays until the new one takes its place.
        (output_dir / "report.json").unlink(missing_ok=True)
        for folder in kind.stale(output_dir / "work", redo, begun, manifest):
            # What cannot be deleted must not be taken for a part of the new build.
            if folder.exists():
                shutil.rmtree(folder)
    if begun is None or redo is not None:
        with replacing(file) as partial:
            partial.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


class Runner(Generic[AnyOptions]):
    """Runs stages; what only one process may do (`engine.is_main`) lies between them."""

    # With its article.
    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]

    def __init__(self, work: Path, options: AnyOptions, engine: LocalEngine | RayEngine, batch_size: int):
        self.work = work
        self.options: AnyOptions = options
        self.engine = engine
        self.batch_size = batch_size

    @staticmethod
    def describe(options: AnyOptions) -> dict:
        """The manifest: the options of every stage, and which versions of inputs, models and word lists they mean."""
        raise NotImplementedError

    @classmethod
    def stale(cls, work: Path, redo: str, begun: dict | None, manifest: dict) -> list[Path]:
        """The folders that do not hold any more when all is done again from a stage on."""
        return [work / stage for stage in cls.stages[cls.stages.index(redo) :]]

    def run(self) -> list[Path]:
        """Returns the Parquet files, in order."""
        raise NotImplementedError

    def report(self, files: list[Path]) -> dict:
        """What was done: rows in and out, what was dropped by reason, and seconds of work, in all and by stage."""
        raise NotImplementedError

    def card(self, report: dict, manifest: dict, license_note: str) -> DatasetCard:
        """The README of the set."""
        raise NotImplementedError

    def hint(self, dropped: dict[str, int]) -> str:
        """What may help when all was dropped."""
        return ""

    def job(self, kind: type[Job], **arguments) -> Job:
        return kind(self.work, self.options, self.batch_size, **arguments)

    def marker(self, stage: str, shard: str) -> Marker:
        return marker_of(self.work / stage / f"{shard}.arrow")

    def stage(self, name: str, job: Job, rows: dict[str, int] | list[str]) -> None:
        """Builds the shards that are not there yet; `rows` names all of them, and if known their rows."""
        missing = [shard for shard in rows if not job.finished(shard)]
        self.engine.wait()
        share = self.engine.share(missing)
        done, total = 0, None
        if isinstance(rows, dict):
            done = sum(rows.values()) - sum(rows[shard] for shard in missing)
            total = done + sum(rows[shard] for shard in share)
        hidden = not self.engine.is_main
        with tqdm(total=total, initial=done, desc=name, unit=" rows", disable=hidden) as progress:
            for count in self.engine.run(job, share) if share else ():
                progress.update(count)
        self.engine.wait()
        if lost := [shard for shard in missing if not job.finished(shard)]:
            raise RuntimeError(f"Stage {name} ended without {len(lost)} of its shards. Run the build again to go on.")

    def count_parts(self, name: str) -> int:
        """The number of files that a collection is read in."""
        file = self.work / "read" / name / "parts.json"
        if self.engine.is_main and not file.exists():
            parts = self.options.read.collections()[name].open().num_shards
            with replacing(file) as partial:
                partial.write_text(json.dumps(parts))
        self.engine.wait()
        return json.loads(file.read_text())

    def read(self, name: str, parts: int) -> None:
        """Stage 1, and the choice of the images that are no duplicates of an earlier one."""
        self.stage(f"read {name}", self.job(ReadJob, collection=name, parts=parts), [f"{n:05}" for n in range(parts)])
        if self.engine.is_main:
            folder = self.work / "read" / name
            shards = [s for n in range(parts) for s in marker_of(folder / f"part-{n:05}").shards]
            hashes = [read_table(folder / f"{shard}.arrow")["hash"].to_numpy() for shard in shards]
            kept = dict(zip(shards, first_occurrences(hashes), strict=True))
            if not any(map(len, kept.values())):
                dropped = summed([folder / f"part-{n:05}" for n in range(parts)])["dropped"]
                raise RuntimeError(f"No image of the {name} is fit to use: {dropped or 'it is empty'}.")
            _save_rows(folder / "kept.npz", kept)
        self.engine.wait()

    def groups(self, pairs: dict[str, int]) -> dict[str, dict[str, int]]:
        """Consecutive shards of the source, with their pairs, that go into one file, so that no file is tiny."""
        groups: list[dict[str, int]] = [{}]
        for shard, count in pairs.items():
            if sum(groups[-1].values()) >= ROWS_PER_FILE:
                groups.append({})
            groups[-1][shard] = count
        return {f"{number:05}": group for number, group in enumerate(groups)}

    def write(self, kind: type[WriteSetJob], pairs: dict[str, int], **arguments) -> list[Path]:
        """The last stage, for shards of the source with their pairs: the Parquet files, in order."""
        groups = self.groups(pairs)
        job = self.job(kind, groups={name: list(shards) for name, shards in groups.items()}, **arguments)
        self.stage("write", job, {name: sum(shards.values()) for name, shards in groups.items()})
        return [job.output(name) for name in groups]


class Builder(Runner[Options]):
    """The seven stages of a build."""

    name = "a build"
    stages = STAGES

    @staticmethod
    def describe(options: Options) -> dict:
        manifest = describe(options, STAGES, captions=options.read.caption_column is None)
        manifest["edit"] |= {"edit_seed": options.edit_seed, "word_data_fingerprint": describe_data()}
        return manifest

    @classmethod
    def stale(cls, work: Path, redo: str, begun: dict | None, manifest: dict) -> list[Path]:
        folders = super().stale(work, redo, begun, manifest)
        if redo in ("caption", "edit") and begun is not None and begun["embed"] == manifest["embed"]:
            # The pool's embeddings take longest and depend on neither: only those of edits go.
            embed = work / "embed"
            folders.remove(embed)
            folders += [embed / "prompt"] + ([embed / "source"] if manifest["read"]["pool"] is not None else [])
        return folders

    def run(self) -> list[Path]:
        """Returns the Parquet files, in order."""
        collections = list(self.options.read.collections())
        # Before hours of work on one of them, all are opened.
        parts = {name: self.count_parts(name) for name in collections}
        for name in collections:
            self.read(name, parts[name])
        source = Collection(self.work, "source")
        rows = {shard: len(kept) for shard, kept in source.kept.items()}
        pool = Collection(self.work, self.options.pool)

        self.stage("caption", self.job(CaptionJob), rows)
        self.stage("edit", self.job(EditJob), rows)
        edits = {shard: self.marker("edit", shard).rows_out for shard in rows}
        for name in collections:
            images = edits if name != self.options.pool else {s: len(kept) for s, kept in pool.kept.items()}
            self.stage(f"embed {name}", self.job(EmbedImagesJob, collection=name), images)
        self.stage("embed prompts", self.job(EmbedPromptsJob), edits)
        self.stage("retrieve", self.job(RetrieveJob, index_file=self.index(pool)), edits)
        if self.engine.is_main and not self.options.mask.rerank_by_mask:
            self.assign_neighbours(source)
        self.engine.wait()
        self.stage("mask", self.job(MaskJob), {s: self.marker("retrieve", s).rows_out for s in rows})
        if self.engine.is_main and self.options.mask.rerank_by_mask:
            self.assign_masked(source)
        self.engine.wait()
        if self.options.mask.rerank_by_mask:
            chosen = np.load(self.work / "mask" / "assigned.npz")
            return self.write(WriteJob, {shard: len(chosen[shard]) for shard in source.shards})
        return self.write(WriteJob, {shard: self.marker("mask", shard).rows_out for shard in source.shards})

    def index(self, pool: Collection) -> Path | None:
        """The index of a pool that is too large for exact search."""
        if len(pool) <= EXACT_LIMIT:
            return None
        # It depends on none of the options of stage retrieve, and takes long to build.
        file = self.work / "embed" / "pool.index"
        if self.engine.is_main and read_marker(file) is None:
            files = [self.work / "embed" / self.options.pool / f"{shard}.npy" for shard in pool.shards]
            build_index(Embeddings(files), file)
            write_marker(file, Marker(len(pool), len(pool)))
        self.engine.wait()
        return file

    def assign_neighbours(self, source: Collection) -> None:
        """Gives each edit its nearest neighbour that has not served too often yet."""
        uses: Counter[int] = Counter()
        assigned = {}
        for shard in source.shards:
            targets = read_table(self.work / "retrieve" / f"{shard}.arrow")["targets"].to_pylist()
            assigned[shard] = assign_targets(targets, uses, self.options.retrieve.max_target_uses)
        _save_rows(self.work / "retrieve" / "assigned.npz", assigned)

    def assign_masked(self, source: Collection) -> None:
        """Gives each edit, of the neighbours whose masks pass, the one that overlaps best and may still serve."""
        uses: Counter[int] = Counter()
        assigned = {}
        for shard in source.shards:
            pairs = read_table(self.work / "mask" / f"{shard}.arrow").select(["row", "target"]).to_pylist()
            first: list[int] = []
            targets: list[list[int]] = []
            for number, pair in enumerate(pairs):
                if number == 0 or pair["row"] != pairs[number - 1]["row"]:
                    first.append(number)
                    targets.append([])
                targets[-1].append(pair["target"])
            width = max(map(len, targets), default=0)
            padded = np.array([row + [-1] * (width - len(row)) for row in targets])
            places = assign_targets(padded, uses, self.options.retrieve.max_target_uses)
            kept = [number + place for number, place in zip(first, places, strict=True) if place >= 0]
            assigned[shard] = np.array(kept, dtype=np.int64)
        _save_rows(self.work / "mask" / "assigned.npz", assigned)

    def report(self, files: list[Path]) -> dict:
        return _report(self.work, files, self.options)

    def card(self, report: dict, manifest: dict, license_note: str) -> DatasetCard:
        return dataset_card(report, manifest, license_note)


def _save_rows(file: Path, rows: Mapping[str, np.ndarray]) -> None:
    """Row numbers, by shard."""
    with replacing(file) as partial, partial.open("wb") as out:
        np.savez(out, allow_pickle=False, **rows)


def marker_of(file: Path) -> Marker:
    """The marker of a shard whose stage is done, which `_Builder.stage` has checked."""
    marker = read_marker(file)
    assert marker is not None, f"{file} is not there whole."
    return marker


def summed(files: list[Path]) -> dict:
    markers = [marker_of(file) for file in files]
    dropped = sum((Counter(marker.dropped) for marker in markers), Counter())
    return {
        "rows_in": sum(marker.rows_in for marker in markers),
        "rows_out": sum(marker.rows_out for marker in markers),
        "dropped": dict(dropped.most_common()),
        "seconds": round(sum(marker.seconds for marker in markers), 4),
        "model_seconds": round(sum(marker.model_seconds for marker in markers), 4),
    }


def reading(work: Path, name: str) -> dict:
    """What the read stage did with a collection, duplicates counted as left out."""
    read = summed([file.with_suffix("") for file in sorted((work / "read" / name).glob("part-*.json"))])
    kept = len(Collection(work, name))
    if duplicates := read["rows_out"] - kept:
        read["dropped"]["duplicate"] = duplicates
        read["rows_out"] = kept
    return read


def _report(work: Path, files: list[Path], options: Options) -> dict:
    source, pool = Collection(work, "source"), Collection(work, options.pool)
    stages = {f"read {name}": reading(work, name) for name in options.read.collections()}
    for stage in ("caption", "edit"):
        stages[stage] = summed([work / stage / f"{shard}.arrow" for shard in source.shards])
    embedded = {options.pool: pool.shards, "source": source.shards}
    for name, shards in (*embedded.items(), ("prompt", source.shards)):
        stages[f"embed {name}"] = summed([work / "embed" / name / f"{shard}.npy" for shard in shards])
    for stage in ("retrieve", "mask"):
        stages[stage] = summed([work / stage / f"{shard}.arrow" for shard in source.shards])
    stages["write"] = summed(files)

    # Neighbours that had served often enough fell out between two stages.
    for stage, later in (("retrieve", "mask"), ("mask", "write")):
        if used_up := stages[stage]["rows_out"] - stages[later]["rows_in"]:
            stages[stage]["dropped"]["target_used_up"] = used_up
            stages[stage]["rows_out"] -= used_up
    dropped: Counter[str] = Counter()
    for stage, numbers in stages.items():
        if not stage.startswith(("read pool", "embed")):
            dropped.update(numbers["dropped"])
    return {
        "rows_in": stages["read source"]["rows_in"],
        "rows_out": stages["write"]["rows_out"],
        "dropped": dict(dropped.most_common()),
        "seconds": round(sum(numbers["seconds"] for numbers in stages.values()), 2),
        "stages": stages,
    }


def _publish(output_dir: Path, runner: Runner, files: list[Path], manifest: dict, license_note: str) -> None:
    """Puts the finished set into its place: the report comes last and says that all else is there."""
    report = runner.report(files)
    if report["rows_out"] == 0:
        hint = runner.hint(report["dropped"])
        raise RuntimeError(f"No pair is left of {report['rows_in']} rows. Left out: {report['dropped']}.{hint}")
    report["files"] = {f"data/{file.name}": file.stat().st_size for file in files}
    with replacing(output_dir / "sheet.jpg") as partial:
        picture_sheet(files).save(partial, "JPEG", quality=90)
    with replacing(output_dir / "README.md") as partial:
        runner.card(report, manifest, license_note).save(partial)

    data = output_dir / "work" / "write" / "data"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    for file in files:
        os.replace(file, data / file.name)
    shutil.rmtree(output_dir / "data", ignore_errors=True)
    os.replace(data, output_dir / "data")
    with replacing(output_dir / "report.json") as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")
