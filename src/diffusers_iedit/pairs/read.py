"""Stage 1: captioned images from wherever `datasets` finds them; what is unfit is counted by reason and left out."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps

from ..images import FORMATS
from .files import check_tables, read_file, set_roots
from .options import ReadOptions


FILE_TYPES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}

SCHEMA = pa.schema({"image": pa.large_binary(), "caption": pa.string(), "hash": pa.uint64()})


@dataclass(frozen=True)
class Collection:
    """One collection of images, and the name of the argument that asked for it."""

    path: str
    split: str
    files: list[str] | None
    revision: str | None
    image_column: str
    caption_column: str | None
    argument: str

    # What `rows` gives.
    schema: ClassVar[pa.Schema] = SCHEMA

    def open(self) -> datasets.IterableDataset:
        """A stream of its rows, images as encoded bytes.

        Raises:
            ValueError: If there is no such collection, split or column.
        """
        stream, tars = open_stream(self.path, self.split, self.files, self.revision, self.argument)
        columns = [self.image_column] + ([] if self.caption_column is None else [self.caption_column])
        if stream is None:
            self._check_columns(tar_columns(tars))
            return stream_tars(tars, [self.image_column], columns[1:])
        self._check_columns(list(stream.features))
        if not holds_images(stream.features[self.image_column]):
            raise ValueError(
                f"`{self._image_argument}` {self.image_column!r} has to hold images, but holds"
                f" {stream.features[self.image_column]}."
            )
        if self.caption_column is not None and not holds_text(stream.features[self.caption_column]):
            raise ValueError(
                f"`caption_column` {self.caption_column!r} has to hold text, but holds"
                f" {stream.features[self.caption_column]}."
            )
        return encoded_columns(stream, columns, [self.image_column])

    def rows(self, stream: datasets.IterableDataset, options: ReadOptions, dropped: Counter) -> Iterator[dict]:
        """As `read_rows`."""
        return read_rows(stream, self, options, dropped)

    @property
    def _image_argument(self) -> str:
        return "image_column" if self.argument == "source" else "pool_image_column"

    def _check_columns(self, columns: list[str]) -> None:
        for option, column in ((self._image_argument, self.image_column), ("caption_column", self.caption_column)):
            if column is not None and column not in columns:
                raise ValueError(
                    f"`{option}` {column!r} is no column of {self.argument} {self.path!r}; its columns:"
                    f" {', '.join(columns) or 'none'}."
                )


def open_stream(
    path: str,
    split: str | None,
    files: list[str] | None,
    revision: str | None,
    argument: str,
    config: str | None = None,
) -> tuple[datasets.IterableDataset | None, list[str]]:
    """Opens a split of a collection, wherever it is and in whatever format `datasets` reads.

    Args:
        path (`str`): A Hub id, a folder (also one of `Dataset.save_to_disk`), or a Parquet, Arrow or tar file.
        split (`str`, *optional*): By default "train", or the only one that there is.
        files (`list[str]`, *optional*): Only these files, as patterns.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        argument (`str`): What the option is called that named the collection, for messages.
        config (`str`, *optional*): The configuration, of a collection that has several.

    Returns:
        `tuple[IterableDataset | None, list[str]]`: A stream whose features are known, or None and the tar files.

    Raises:
        ValueError: If there is no such collection or split, or if it declares no types.
    """
    named = path
    if os.path.isfile(path):
        if Path(path).suffix not in FILE_TYPES:
            raise ValueError(f"`{argument}` has to end in {', '.join(FILE_TYPES)} if it is a file: {path}")
        if files is not None:
            raise ValueError(f"`{argument}_files` chooses among several files, but {path} is one.")
        path, files = FILE_TYPES[Path(path).suffix], [path]
    saved: str | list[str] | dict[str, str] | None = files
    if files is None and (found := _saved_to_disk(Path(path))):
        # By itself, `datasets` takes its JSON files for the data.
        path, saved = "arrow", found
    try:
        builder = datasets.load_dataset_builder(path, config, data_files=saved, revision=revision)
        splits = {str(name): list(names) for name, names in (builder.config.data_files or {}).items()}
        if split is None:
            split = next(iter(splits)) if len(splits) == 1 else "train"
        if split not in splits:
            raise ValueError(f"`{argument}_split` {split!r} is none of its splits: {', '.join(splits)}.")
        check_tables(splits[split], skip_damaged=True)
        tars = splits[split] if all(name.endswith(".tar") for name in splits[split]) else []
        stream = None if tars else builder.as_streaming_dataset(split)
    except (OSError, ValueError) as error:
        raise ValueError(f"`{argument}` {named!r} cannot be opened: {' '.join(str(error).split())}") from error
    if stream is not None and stream.features is None:
        raise ValueError(f"`{argument}` {named!r} declares no types of its columns: make parquet of it.")
    return stream, tars


def _saved_to_disk(folder: Path) -> dict[str, str] | None:
    """The files, by split, of a folder that `save_to_disk` of `datasets` wrote."""
    if (folder / "state.json").is_file():
        return {"train": str(folder / "data-*.arrow")}
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        return {name: str(folder / name / "data-*.arrow") for name in splits}
    return None


def encoded_columns(
    stream: datasets.IterableDataset, columns: list[str], images: list[str]
) -> datasets.IterableDataset:
    """Only these columns of a stream, with those of images as they are stored."""
    # Of image files of the Hub, threads would decode pictures before they get here, in any format.
    stream = stream.decode(False).select_columns(columns)
    for name in images:
        stream = stream.cast_column(name, datasets.Image(decode=False))
    return stream


def tar_columns(files: list[str]) -> list[str]:
    """The columns of webdataset tars."""
    columns: set[str] = set()
    for file in files:
        # A damaged tar is counted when it is read. Here the first one that is not says what there is.
        with suppress(tarfile.TarError):
            for sample in islice(_tar_samples(file), 32):
                columns |= sample.keys()
        if columns:
            break
    return sorted(columns)


def stream_tars(files: list[str], images: list[str], texts: list[str]) -> datasets.IterableDataset:
    """A stream of the samples of webdataset tars: images as they are stored, and texts."""
    features = {name: datasets.Image(decode=False) for name in images}
    features |= {name: datasets.Value("string") for name in texts}
    # The files are shared among workers, as they are a list; the columns are not.
    arguments = {"files": files, "images": tuple(images), "texts": tuple(texts)}
    return datasets.IterableDataset.from_generator(
        _tar_rows, features=datasets.Features(features), gen_kwargs=arguments
    )


def _has_type(feature, *types: str) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in types


def holds_text(feature) -> bool:
    """Whether a column of `datasets` has strings."""
    return _has_type(feature, "string", "large_string")


def holds_images(feature) -> bool:
    """Whether a column of `datasets` can have images: encoded, or the paths of files."""
    if isinstance(feature, dict):
        return not feature.keys().isdisjoint(("bytes", "path"))
    return isinstance(feature, datasets.Image) or holds_text(feature) or _has_type(feature, "binary", "large_binary")


def _tar_samples(file: str) -> Iterator[dict[str, bytes]]:
    """The samples of a webdataset tar: neighbouring members of one name, by what follows the name's first dot.

    `datasets` reads such tars too, but takes one that is cut off between two members for whole, loses all that follows
    a caption with one bad byte, and opens none whose first samples are incomplete.

    Raises:
        tarfile.TarError: If the tar is damaged, after its samples up to there.
    """
    try:
        # Ranges of this size are fetched, and fetched again if that fails, when the file is remote.
        with fsspec.open(file, block_size=2**25) as opened, tarfile.open(fileobj=opened, mode="r:") as tar:
            key: str | None = None
            sample: dict[str, bytes] = {}
            for member in tar:
                parts = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]+)", member.name)
                if not member.isreg() or parts is None:
                    continue
                name, column = parts[1], parts[2].lower()
                if sample and (name != key or column in sample):
                    yield sample
                    sample = {}
                content = tar.extractfile(member)
                # None is only for members that are no files.
                assert content is not None
                key, sample[column] = name, content.read()
            if sample:
                yield sample
            # tarfile takes a header that it cannot read for the end, but a whole tar ends with a block of zeros.
            opened.seek(tar.offset)
            if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("damaged header or no end")
    except tarfile.TarError as error:
        raise tarfile.ReadError(f"{file}: {error}") from error


def _tar_rows(files: list[str], images: tuple[str, ...], texts: tuple[str, ...]) -> Iterator[dict]:
    for file in files:
        for sample in _tar_samples(file):
            row: dict[str, dict[str, bytes | None] | str | None] = dict.fromkeys(images)
            row |= {name: {"bytes": sample[name], "path": None} for name in images if name in sample}
            row |= {name: sample.get(name, b"").decode(errors="replace") for name in texts}
            yield row


class UnfitImageError(ValueError):
    """Why an image cannot serve: the word that it is counted under."""


def fit_image(encoded: bytes | None, min_size: int, max_size: int) -> tuple[bytes, int]:
    """An image as every later stage takes it: RGB, upright, of a bounded size.

    Bytes that are fit already are returned as they are.

    Args:
        encoded (`bytes`, *optional*): An image file in a format that PIL reads.
        min_size (`int`): Smallest shorter side, pixels.
        max_size (`int`): Largest shorter side, pixels; larger images are scaled down.

    Returns:
        `tuple[bytes, int]`: The image file, and a 64-bit hash of its pixels that finds duplicates.

    Raises:
        UnfitImageError: "missing", "unreadable", "truncated", "too_small" or "too_large".
    """
    if not encoded:
        raise UnfitImageError("missing")
    try:
        with warnings.catch_warnings():
            # PIL warns of files that are large or odd but fine; those beyond its limit raise.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
            if min(image.size) < min_size:
                raise UnfitImageError("too_small")
            kind, original = image.format, image.size
            # A JPEG much larger than asked for is decoded at a fraction of its size.
            image.draft(None, (max_size, max_size))
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
            fit = ImageOps.exif_transpose(image)
            if fit.mode.startswith(("I", "F")):
                # PIL clips more than 8 bits instead of scaling them.
                values = np.nan_to_num(np.asarray(fit, dtype=np.float32))
                white = 65535 if fit.mode.startswith("I") else max(values.max(), 1e-9)
                fit = Image.fromarray((values * (255 / white)).clip(0, 255).astype(np.uint8))
            transparent = fit.has_transparency_data
            if transparent:
                # What lies under transparent pixels is arbitrary, often black.
                layer = fit.convert("RGBA")
                fit = Image.new("RGB", layer.size, "white")
                fit.paste(layer, mask=layer.getchannel("A"))
            fit = fit.convert("RGB")
            if min(fit.size) > max_size:
                scale = max_size / min(fit.size)
                fit = fit.resize([round(side * scale) for side in fit.size], Image.Resampling.LANCZOS)
    except (UnfitImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnfitImageError("too_large") from error
    except OSError as error:
        raise UnfitImageError("truncated" if "truncated" in str(error) else "unreadable") from error
    except Exception as error:
        # Damaged files make PIL's decoders raise nearly anything: SyntaxError, struct.error, IndexError ...
        raise UnfitImageError("unreadable") from error

    pixels = hashlib.blake2b(fit.tobytes() + str(fit.size).encode(), digest_size=8).digest()
    as_it_came = image.mode == "RGB" and fit.size == original and not turned and not transparent
    if not as_it_came or kind not in ("JPEG", "PNG", "WEBP"):
        # Neither the profile nor the transparency of the file that it came in describes it any more.
        fit.info.clear()
        file = io.BytesIO()
        # What came without loss stays without.
        fit.save(file, "JPEG" if kind in ("JPEG", "MPO", "WEBP") else "PNG", quality=95)
        encoded = file.getvalue()
    return encoded, int.from_bytes(pixels, "big")


def clean_text(text: str | None) -> str:
    """A caption on one line, without control characters; the joiners that emoji and some scripts need stay."""
    kept = []
    for character in text or "":
        if character.isprintable() or character in "\u200c\u200d":
            kept.append(character)
        elif unicodedata.category(character) != "Cf":
            # White space of any kind, control characters, halves of surrogate pairs.
            kept.append(" ")
    return " ".join("".join(kept).split())


def _is_damage(error: Exception) -> bool:
    """Whether a file of a collection is damaged. Anything else, above all a network that fails, has to stop the build:
    its rows would be lost."""
    # A bare OSError is pyarrow's for a file that is cut off: systems give an errno, libraries a class of their own.
    bare = type(error) is OSError and error.errno is None
    return bare or isinstance(error, (tarfile.TarError, pa.ArrowInvalid, UnicodeDecodeError))


def undamaged_rows(stream: datasets.IterableDataset, path: str, dropped: Counter) -> Iterator[dict]:
    """The rows of a stream up to where its file is damaged, which is counted."""
    rows = iter(stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            if not _is_damage(error):
                raise
            # No iterator goes on after an error: what is left of this file is lost with it.
            warnings.warn(f"The rest of a damaged file in {path} is left out: {error}", stacklevel=2)
            dropped["damaged_file"] += 1
            return
        yield row


def read_image(file: dict | None, roots: tuple[str, ...], where: str) -> bytes | None:
    """The bytes of a stored image; None if it is not there.

    Raises:
        FileNotFoundError: If it is on the Hub, which may only be out of reach: that has to stop the build.
        ValueError: If it is not part of the collection; the message begins with `where`.
    """
    if not file or not (file["bytes"] or file["path"]):
        return None
    try:
        return read_file(file, roots)
    except FileNotFoundError:
        if "://" in file["path"]:
            raise
        return None
    except ValueError as error:
        raise ValueError(f"{where}: a row cannot be read: {error}.") from error


def read_rows(
    stream: datasets.IterableDataset, collection: Collection, options: ReadOptions, dropped: Counter
) -> Iterator[dict]:
    """The rows of a stream that are fit, with the columns of SCHEMA; the others are counted in `dropped`."""
    roots = set_roots(collection.path)
    for row in undamaged_rows(stream, collection.path, dropped):
        caption = row[collection.caption_column] if collection.caption_column else None
        encoded = read_image(row[collection.image_column], roots, f"`{collection.argument}` {collection.path!r}")
        try:
            image, pixels = fit_image(encoded, options.min_size, options.max_size)
        except UnfitImageError as reason:
            dropped[str(reason)] += 1
            continue
        yield {"image": image, "caption": caption and clean_text(caption), "hash": pixels}


def first_occurrences(hashes: list[np.ndarray]) -> list[np.ndarray]:
    """Which rows of a collection to keep so that no image is there twice.

    Args:
        hashes (`list[np.ndarray]`): For each shard, in order, the hashes of its rows, uint64.

    Returns:
        `list[np.ndarray]`: For each shard the row numbers to keep, ascending.
    """
    _, first = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]), return_index=True)
    ends = np.cumsum([0, *map(len, hashes)])
    first.sort()
    cuts = np.searchsorted(first, ends)
    return [first[start:end] - offset for start, end, offset in zip(cuts, cuts[1:], ends, strict=False)]
