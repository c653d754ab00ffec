"""Stage 1 of an import: the pairs of a set that somebody else made, whatever its columns are called."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from PIL import ExifTags, Image

from ..images import FORMATS, open_image
from .columns import FOLDER, IMAGE_ROLES, ROLES, SETS, SetColumns, recognise
from .files import set_roots
from .masks import decode_runs, read_mask, same_aspect, to_image
from .options import ReadPairsOptions
from .read import (
    UnfitImageError,
    clean_text,
    encoded_columns,
    fit_image,
    holds_images,
    holds_text,
    open_stream,
    read_image,
    stream_tars,
    tar_columns,
    undamaged_rows,
)


_TEXT = datasets.Value("string")


def _is_folder_of_pairs(path: str) -> bool:
    return os.path.isdir(path) and next(Path(path).glob("*_before.*"), None) is not None


def _folder_rows(folder: str, columns: tuple[str, ...]) -> Iterator[dict]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    # Without their ends; of several pictures of one name the first.
    pictures = {Path(name).stem: name for name in reversed(names) if not name.endswith(".txt")}
    texts = {Path(name).stem: name for name in names if name.endswith(".txt")}
    for stem in sorted(name.removesuffix("_before") for name in pictures if name.endswith("_before")):
        row: dict[str, Any] = dict.fromkeys(columns)
        for column in columns:
            if column == "txt":
                row["txt"] = _decode(Path(folder, texts[stem]).read_bytes()) if stem in texts else None
            elif file := pictures.get(f"{stem}_{column}"):
                row[column] = {"bytes": None, "path": file}
        yield row


def _decode(text: bytes) -> str:
    """A text file in UTF-8, or in the UTF-16 that editors of Windows write, which begins with a mark of its own."""
    encoding = "utf-16" if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"
    return text.decode(encoding, errors="replace")


def _stream_folder(folder: str) -> datasets.IterableDataset:
    """The pairs of a folder, in order: pictures a_before and a_after in any format, and what lies beside them."""
    names = os.listdir(folder)
    columns = ["before", "after"]
    columns += ["mask"] if any(Path(name).stem.endswith("_mask") for name in names) else []
    columns += ["txt"] if any(name.endswith(".txt") for name in names) else []
    features = {name: _TEXT if name == "txt" else datasets.Image(decode=False) for name in columns}
    return datasets.IterableDataset.from_generator(
        _folder_rows, features=datasets.Features(features), gen_kwargs={"folder": folder, "columns": tuple(columns)}
    )


SESSIONS, DESCRIPTIONS = "edit_sessions.json", "global_descriptions.json"
"""Of MagicBrush's test set: the turns of each picture, and what all pictures show."""


def _session_rows(folder: str) -> Iterator[dict]:
    file = Path(folder, DESCRIPTIONS)
    try:
        sessions = json.loads(Path(folder, SESSIONS).read_text(encoding="utf-8"))
        descriptions = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        rows = []
        for key, turns in sessions.items():
            captions = descriptions.get(key, {})
            for turn in turns:
                row = {
                    f"{column}_img": {"bytes": None, "path": f"images/{key}/{turn[name]}"}
                    for column, name in (("source", "input"), ("mask", "mask"), ("target", "output"))
                }
                row |= {"source_caption": captions.get(turn["input"]), "target_caption": captions.get(turn["output"])}
                rows.append(row | {"instruction": turn["instruction"]})
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder} is not MagicBrush's test set: {type(error).__name__}: {error}") from error
    yield from rows


def _stream_sessions(folder: str) -> datasets.IterableDataset:
    """MagicBrush's test set as it is handed out: https://github.com/OSU-NLP-Group/MagicBrush."""
    images = dict.fromkeys(("source_img", "mask_img", "target_img"), datasets.Image(decode=False))
    captions = ["source_caption", "target_caption"]
    stream = datasets.IterableDataset.from_generator(
        _session_rows,
        features=datasets.Features(images | dict.fromkeys([*captions, "instruction"], _TEXT)),
        gen_kwargs={"folder": folder},
    )
    return stream if Path(folder, DESCRIPTIONS).exists() else stream.remove_columns(captions)


def stream_folder(path: str) -> datasets.IterableDataset | None:
    """The pairs of a folder that `datasets` does not read: one of pairs, or MagicBrush's test set."""
    if Path(path, SESSIONS).is_file():
        return _stream_sessions(path)
    return _stream_folder(path) if _is_folder_of_pairs(path) else None


def _holds(feature, role: str) -> bool:
    """Whether a column can have what a role asks for."""
    if role in ("source", "target"):
        return holds_images(feature)
    if isinstance(feature, (list, datasets.List)):
        # Instructions in several wordings, runs of a mask.
        item = feature[0] if isinstance(feature, list) else feature.feature
        is_number = isinstance(item, datasets.Value) and item.dtype.startswith(("int", "uint"))
        return (role == "instruction" and holds_text(item)) or (role == "mask" and is_number)
    return holds_images(feature) if role == "mask" else holds_text(feature)


def _holds_runs(feature) -> bool:
    return holds_text(feature) or isinstance(feature, (list, datasets.List))


class PairCollection:
    """The set that an import reads.

    Args:
        options (`ReadPairsOptions`): Which set, and what its columns hold.
    """

    schema: ClassVar[pa.Schema] = pa.schema(
        {
            "image": pa.large_binary(),
            "target": pa.large_binary(),
            # As large as the image, 255 = edit.
            "mask": pa.large_binary(),
            "caption": pa.string(),
            "prompt": pa.string(),
            "instruction": pa.string(),
            "hash": pa.uint64(),
        }
    )

    argument = "source"

    def __init__(self, options: ReadPairsOptions):
        self.options = options
        self.path, self.revision = options.source, options.source_revision
        # What marks the edit in the masks: `open` finds it out.
        self.mask_convention = options.mask_convention or "white"

    def open(self) -> datasets.IterableDataset:
        """A stream with a column for each of `ROLES` that the set has, images as encoded bytes.

        Raises:
            ValueError: If there is no such set, split or column, or if it is not known what its columns hold.
        """
        stream, tars, found = self._find()
        images = [found[role] for role in IMAGE_ROLES if role in found]
        if stream is None:
            texts = [found[role] for role in ROLES if role in found and role not in IMAGE_ROLES]
            stream = stream_tars(tars, images, texts)
        else:
            # Runs of pixels stay as they are; a text in the place of a picture is the path of one.
            images = [name for name in images if name != found.get("mask") or not _holds_runs(stream.features[name])]
            stream = encoded_columns(stream, list(found.values()), images)
        return stream.rename_columns({column: role for role, column in found.items() if column != role})

    def find_columns(self) -> dict[str, str]:
        """The set's column for each of `ROLES` that it has.

        Raises:
            ValueError: As `open`.
        """
        return self._find()[2]

    def _find(self) -> tuple[datasets.IterableDataset | None, list[str], dict[str, str]]:
        """The set as it is, or its tars; and its columns by role."""
        tars: list[str] = []
        stream = stream_folder(self.path)
        if stream is None:
            options = self.options
            stream, tars = open_stream(
                self.path,
                options.source_split,
                options.source_files,
                options.source_revision,
                self.argument,
                options.source_config,
            )
        columns = tar_columns(tars) if stream is None else list(stream.features)
        known = self._known_columns(columns)
        found, self.mask_convention = known.find(columns), known.mask_convention
        self._check_columns(found, columns)
        for role, column in found.items():
            if stream is not None and not _holds(stream.features[column], role):
                kinds = {"source": "images", "target": "images", "mask": "images or runs of pixels"}
                raise ValueError(
                    f"`{role}_column` {column!r} has to hold {kinds.get(role, 'text')}, but holds"
                    f" {stream.features[column]}."
                )
        return stream, tars, found

    def _known_columns(self, columns: list[str]) -> SetColumns:
        """What the set has where: by its format, and by what the options say otherwise."""
        options = self.options
        given = {role: getattr(options, f"{role}_column") for role in ROLES}
        given = {role: name for role, name in given.items() if name is not None}
        name = options.format
        if name is None and not {"source", "target"} <= given.keys() and not _is_folder_of_pairs(self.path):
            name = recognise(columns)
        known = FOLDER if _is_folder_of_pairs(self.path) else SetColumns((), ())
        if name is not None:
            known = SETS[name]
        # A column that is said to hold one thing holds nothing else.
        left = {
            role: tuple(column for column in getattr(known, role) if column not in given.values()) for role in ROLES
        }
        chosen = left | {role: (name,) for role, name in given.items()}
        return replace(known, **chosen, mask_convention=options.mask_convention or known.mask_convention)

    def _check_columns(self, found: dict[str, str], columns: list[str]) -> None:
        there = f"{self.argument} {self.path!r}; its columns: {', '.join(columns) or 'none'}"
        roles = {column: role for role, column in reversed(found.items())}
        for role, column in found.items():
            if roles[column] != role:
                raise ValueError(f"`{roles[column]}_column` and `{role}_column` are both {column!r} of {there}.")
        for role in ROLES:
            name = getattr(self.options, f"{role}_column")
            if name is not None and role not in found:
                raise ValueError(f"`{role}_column` {name!r} is no column of {there}.")
        if missing := [f"`{role}_column`" for role in ("source", "target") if role not in found]:
            what = f"`format` {self.options.format} does not fit" if self.options.format else "No known format fits"
            # What `datasets` makes of a folder of nothing but pictures.
            bare = not {*columns} - {"image", "label"}
            named = " Pairs of picture files are called a_before.png and a_after.png, in one folder." if bare else ""
            raise ValueError(f"{what} {there}. Say which they are by {' and '.join(missing)}.{named}")

    def rows(self, stream: datasets.IterableDataset, options: ReadPairsOptions, dropped: Counter) -> Iterator[dict]:
        """The fit rows of a stream of `open`, with the columns of `schema`; others are counted in `dropped`."""
        roots, where = set_roots(self.path), f"`{self.argument}` {self.path!r}"
        for row in undamaged_rows(stream, self.path, dropped):
            files = {role: read_image(row[role], roots, where) for role in ("source", "target")}
            fit = {}
            for role, file in files.items():
                try:
                    fit[role] = fit_image(file, options.min_size, options.max_size)
                except UnfitImageError as reason:
                    dropped[f"{role}_{reason}"] += 1
                    break
            if len(fit) < len(files):
                continue
            if fit["source"][1] == fit["target"][1]:
                dropped["unchanged"] += 1
                continue
            texts = {role: _text(row.get(role)) for role in ("caption", "prompt", "instruction")}
            mask = row.get("mask")
            if isinstance(mask, dict):
                mask = read_image(mask, roots, where)
            try:
                mask = mask and self._mask(mask, files["source"], fit["source"][0])
            except UnfitImageError as reason:
                dropped[f"mask_{reason}"] += 1
                continue
            key = repr((fit["source"][1], fit["target"][1], texts["prompt"], texts["instruction"]))
            digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
            pictures = {"image": fit["source"][0], "target": fit["target"][0], "mask": mask or None}
            yield pictures | texts | {"hash": int.from_bytes(digest, "big")}

    def _mask(self, value: bytes | str | list[int], original: bytes | None, fitted: bytes) -> bytes:
        """A mask of the set as a PNG file of the mode L, 255 = edit, as large as the fitted source.

        Raises:
            UnfitImageError: "unreadable" or "other_aspect".
            ValueError: If masks are not as `mask_convention` says.
        """
        source = open_image(fitted).convert("RGB")
        try:
            if isinstance(value, bytes):
                mask = open_image(value)
            else:
                # They count the pixels of the picture as it came.
                assert original is not None
                mask = to_image(decode_runs(value, _upright_size(original)), source.size)
        except ValueError as error:
            raise UnfitImageError("unreadable") from error
        if not same_aspect(mask.size, source.size):
            raise UnfitImageError("other_aspect")
        # Runs have no colour: they are the edit.
        convention = self.mask_convention if isinstance(value, bytes) else "white"
        file = io.BytesIO()
        read_mask(mask, source, convention).save(file, "PNG")
        return file.getvalue()


def _text(value: str | list[str] | None) -> str | None:
    """A text on one line; of several wordings the first."""
    if isinstance(value, list):
        value = next((text for text in value if text and text.strip()), None)
    return clean_text(value) or None


def _upright_size(encoded: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
        width, height = image.size
        return (height, width) if turned else (width, height)
