"""`iedit batch`: many edits that one file asks for, shared among processes; stopped at any moment, it can go on.

How an edit is read and made is given; here is only which edits there are, and which of them are done.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from filelock import FileLock

from .resuming import differences, lock_folder, replacing


if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

    from .engines import LocalEngine, RayEngine


# What the jobs of one kind may differ in.
OWN = ("image", "prompt", "mask", "mask_prompt", "source_prompt", "seed", "output")

# There is no room for the next one either.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Picture:
    """A picture in a row of a data set, which is read when it is wanted.

    Args:
        rows (`datasets.Dataset`): The column of pictures.
        number (`int`): Of the row, from 1.
    """

    rows: Dataset
    number: int

    def read(self) -> Image.Image:
        """The picture.

        Raises:
            FileNotFoundError, ValueError: If it cannot be read, in one line.
        """
        return next(iter(self.rows[self.number - 1].values()))

    def __str__(self) -> str:
        return f"row {self.number}, {self.rows.column_names[0]}"


@dataclass(frozen=True)
class Job:
    """One edit.

    Args:
        number (`int`): Of its line in the file, or its row in the data set, from 1.
        options (`dict`): By the names that `iedit edit` has for them; `image`, `mask` and `output` are absolute paths,
            the first two may be a [`Picture`].
    """

    number: int
    options: dict[str, Any]


class JobSource(NamedTuple):
    """Where jobs come from.

    Args:
        rows (`Iterable`): What each line says, and its number.
        name (`str`): For messages.
        line (`str`): What one of them is called there.
        folder (`Path`): What paths are relative to.
        fingerprint (`str`): Tells it from others.
    """

    rows: Iterable[tuple[int, dict[str, Any]]]
    name: str
    line: str
    folder: Path
    fingerprint: str

    def place(self, number: int) -> str:
        return f"{self.name}, {self.line} {number}"


def open_source(name: str, split: str = "train") -> JobSource:
    """Opens a file of jobs (JSON Lines), or a data set: a folder or a Hub id.

    Args:
        name (`str`): Of the file, folder or Hub id.
        split (`str`): Of the data set.

    Raises:
        ValueError: If it is no data set, or one whose `image` or `mask` are no pictures.
        OSError: If the file cannot be read.
    """
    file = Path(name)
    if file.is_file() or file.suffix in (".jsonl", ".json"):
        fingerprint = sha256(file.read_bytes()).hexdigest()
        return JobSource(_read_lines(file), name, "line", file.parent, fingerprint)

    from .pairs.schema import Image, open_set

    rows = open_set(name, split)
    pictures = {column for column, feature in rows.features.items() if isinstance(feature, Image)}
    for column in {"image", "mask"} & {*rows.column_names} - pictures:
        # What a stranger's rows name is not to be read from this machine.
        raise ValueError(f"{name}: column {column!r} has to hold pictures, but holds {rows.features[column]}")
    columns = {column: rows.select_columns([column]) for column in pictures}
    texts = rows.remove_columns([*pictures])

    def read() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(texts if texts.column_names else [{}] * len(rows), start=1):
            yield number, row | {column: Picture(of, number) for column, of in columns.items()}

    return JobSource(read(), name, "row", file, rows._fingerprint)


def _read_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file and the numbers of their lines; empty lines are passed over."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, start=1):
            if not line.strip():
                continue
            try:
                job = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: is no JSON ({error})") from error
            if not isinstance(job, dict):
                raise ValueError(f"{file}, line {number}: has to be a JSON object, but is {line.decode().strip():.40}")
            yield number, job


def read_jobs(
    source: JobSource, output_dir: Path, parse: Callable[[dict[str, Any]], dict[str, Any]], any_output: bool = False
) -> list[Job]:
    """Reads jobs, all of them before any is done.

    Args:
        source ([`JobSource`]): What is asked for.
        output_dir (`Path`): What outputs are relative to; by default they are called NUMBER.png.
        parse (`Callable`): From the values of a line to the options of an edit; `ValueError` says what is wrong.
        any_output (`bool`): Whether outputs may lie outside of `output_dir`.

    Raises:
        ValueError: For the first line that cannot be used, a file without any, outputs that two jobs share, that lie
            elsewhere, or that would replace a picture which a job reads; the message names the lines.
    """
    jobs: list[Job] = []
    by_output: dict[str, int] = {}
    by_input: dict[str, int] = {}
    home = os.path.realpath(output_dir)
    for number, values in source.rows:
        try:
            # What is null says as little as what is not there.
            given = {name: value for name, value in values.items() if value is not None}
            pictures = {name: value for name, value in given.items() if isinstance(value, Picture)}
            texts = {name: str(value) for name, value in pictures.items()}
            options = {"seed": number} | parse({"output": f"{number:06}.png"} | given | texts) | pictures
            for name in {"image", "mask"} & options.keys() - pictures.keys():
                # An absolute path, as the command's own `mask` is, stays.
                options[name] = Path(os.path.abspath(source.folder / options[name]))
                by_input.setdefault(os.path.realpath(options[name]), number)
            named = options["output"]
            options["output"] = Path(os.path.realpath(output_dir / named))
            if not any_output and not options["output"].is_relative_to(home):
                raise ValueError(f"output {str(named)!r} lies outside of {output_dir}; --any-output allows it")
        except ValueError as error:
            raise ValueError(f"{source.place(number)}: {error}") from error
        first = by_output.setdefault(str(options["output"]), number)
        if first != number:
            raise ValueError(f"{source.place(number)}: has the output of {source.line} {first}, {str(named)!r}")
        jobs.append(Job(number, options))
    if not jobs:
        raise ValueError(f"{source.name} has no jobs; expected a JSON object a line, with an `image` and a `prompt`")
    for output in by_output.keys() & by_input.keys():
        raise ValueError(
            f"{source.place(by_output[output])}: its output {output} is read in {source.line} {by_input[output]}, and"
            " would be lost"
        )
    return jobs


def _batches(jobs: list[Job], batch_size: int) -> list[list[Job]]:
    """Jobs of one kind, up to `batch_size` together. They depend on the jobs alone: neighbours show in last bits."""
    kinds: dict[tuple, list[Job]] = {}
    for job in jobs:
        kind = tuple(sorted((name, value) for name, value in job.options.items() if name not in OWN))
        kinds.setdefault(kind, []).append(job)
    return [
        alike[start : start + batch_size] for alike in kinds.values() for start in range(0, len(alike), batch_size)
    ]


class Results:
    """`results.jsonl`: a line a job, written when it is done or has failed, by whichever process did it.

    A job whose line is not there whole is not done.
    """

    def __init__(self, output_dir: Path):
        self.file = output_dir / "results.jsonl"
        self._lock = output_dir / ".results.lock"

    def read(self) -> dict[int, dict[str, Any]]:
        """The rows by the numbers of their jobs."""
        rows = {}
        for line in self.file.read_bytes().splitlines() if self.file.exists() else ():
            try:
                row = json.loads(line)
                rows[row["job"]] = row
            # It was cut off.
            except (ValueError, TypeError, KeyError):
                continue
        return rows

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Adds rows, all of them or none.

        Raises:
            OSError: If there is no room.
        """
        lines = _to_lines(rows)
        with FileLock(self._lock), self.file.open("a+b", buffering=0) as opened:
            end = opened.seek(0, os.SEEK_END)
            if end and os.pread(opened.fileno(), 1, end - 1) != b"\n":
                lines = b"\n" + lines
            try:
                if opened.write(lines) < len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(opened.fileno())
            except OSError as error:
                opened.truncate(end)
                error.filename = str(self.file)
                raise

    def rewrite(self, rows: Iterable[dict[str, Any]]) -> None:
        """Puts rows in the place of all that is there."""
        with FileLock(self._lock), replacing(self.file) as partial:
            partial.write_bytes(_to_lines(rows))


def _to_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


class Editor(Protocol):
    """What edits."""

    def load(self) -> None:
        """Makes sure that the model is there."""

    def __call__(self, jobs: list[dict[str, Any]]) -> list[str | None]:
        """Edits jobs of one kind, by their options, and writes their outputs; returns why each failed, or None."""


@dataclass
class EditJobs:
    """A batch of jobs, as the engines run it: by its number.

    Args:
        edit ([`Editor`]): What makes the edits.
        batches (`list[list[Job]]`): All of them.
        output_dir (`Path`): Where the results are.
    """

    edit: Editor
    batches: list[list[Job]]
    output_dir: Path

    has_model: ClassVar[bool] = True

    def __call__(self, shard: str) -> Iterator[int]:
        jobs = self.batches[int(shard)]
        self.edit.load()
        started = perf_counter()
        errors = self.edit([job.options for job in jobs])
        seconds = round((perf_counter() - started) / len(jobs), 3)
        rows = []
        for job, error in zip(jobs, errors, strict=True):
            output: Path = job.options["output"]
            inside = output.is_relative_to(self.output_dir)
            where = {"output": str(output.relative_to(self.output_dir) if inside else output)}
            outcome = where if error is None else {"error": error}
            rows.append({"job": job.number} | outcome | {"seed": job.options["seed"], "seconds": seconds})
        Results(self.output_dir).append(rows)
        yield len(rows)


@contextmanager
def _claimed(output_dir: Path, engine: LocalEngine | RayEngine) -> Iterator[None]:
    """Keeps the folder for this batch, if it is one's; of several processes, the main one does."""
    if not engine.is_main:
        yield
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    # What is hidden are locks.
    held = [file for file in output_dir.glob("[!.]*") if file.suffix != ".partial"]
    if held and not (output_dir / "batch.json").exists():
        raise ValueError(f"{output_dir} is not empty, and what it holds is no batch's: take another folder")
    with lock_folder(output_dir, "batch"):
        yield


def _begin(output_dir: Path, config: dict[str, Any], retry_failed: bool) -> None:
    """Checks that the folder belongs to these jobs, and clears away what a kill left."""
    file = output_dir / "batch.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            other = differences(found, config)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{file} is damaged, or of no batch: take another folder") from error
        if other:
            raise ValueError(f"{output_dir} holds another batch: {'; '.join(other)}. Take another folder")
    else:
        with replacing(file) as partial:
            partial.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for pattern in ("*.partial", ".iedit-*.part"):
        for partial in output_dir.rglob(pattern):
            partial.unlink()
    results = Results(output_dir)
    results.rewrite(row for row in results.read().values() if not (retry_failed and "error" in row))


def run(
    jobs: list[Job],
    edit: Editor,
    output_dir: Path,
    config: dict[str, Any],
    engine: LocalEngine | RayEngine,
    batch_size: int = 1,
    retry_failed: bool = False,
) -> list[dict[str, Any]]:
    """Does what is left to do of some jobs.

    Args:
        jobs (`list[Job]`): From `read_jobs`.
        edit ([`Editor`]): It can be pickled.
        output_dir (`Path`): A new folder, or that of an earlier run of the same jobs.
        config (`dict`): All that the outputs depend on besides: what a folder's batch is known by.
        engine (`LocalEngine` or `RayEngine`): Who does the work.
        batch_size (`int`): How many jobs of one kind are edited together. They are always the same ones: where one of
            them is to be done again, all of them are, as their results depend on each other in the last bits.
        retry_failed (`bool`): Whether to try again what failed before.

    Returns:
        `list[dict]`: What `results.jsonl` holds at the end: a row a job, in their order.

    Raises:
        ValueError: If the folder holds something else.
        RuntimeError: If another process is at work on the folder.
        OSError: If the disk is full.
    """
    from tqdm.auto import tqdm

    # Workers may run in another folder.
    output_dir = output_dir.resolve()
    results = Results(output_dir)
    with _claimed(output_dir, engine):
        if engine.is_main:
            _begin(output_dir, {"batch_size": batch_size} | config, retry_failed)
        engine.wait()
        batches = _batches(jobs, batch_size)
        known = results.read().keys()
        missing = [number for number, batch in enumerate(batches) if not known >= {job.number for job in batch}]
        engine.wait()
        share = engine.share(missing)
        done = len(jobs) - sum(len(batches[number]) for number in missing)
        total = done + sum(len(batches[number]) for number in share)
        work = EditJobs(edit, batches, output_dir)
        with tqdm(total=total, initial=done, desc="Editing", unit=" edits", disable=not engine.is_main) as progress:
            for count in engine.run(work, [str(number) for number in share]) if share else ():
                progress.update(count)
        engine.wait()
        rows = results.read()
        if lost := len({job.number for job in jobs} - rows.keys()):
            raise RuntimeError(f"{lost} of {len(jobs)} jobs were not done")
        in_order = [rows[job.number] for job in jobs]
        if engine.is_main:
            results.rewrite(in_order)
        # Nobody goes before the results are in their place.
        engine.wait()
    return in_order
