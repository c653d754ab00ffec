"""The files of a set: its tables have to be alike, and the pictures that its rows name have to lie in it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name


def set_roots(source: str | os.PathLike) -> tuple[str, ...]:
    """What the paths of a set's own files begin with; paths that are relative are so to the first of them.

    Args:
        source (`str` or `os.PathLike`): A folder, a file, which stands for its folder, or a Hub id.
    """
    path = Path(source)
    if path.exists():
        folder = path.resolve() if path.is_dir() else path.resolve().parent
        # The files of a downloaded snapshot are links to what lies beside it.
        return (str(folder), str(folder.parents[1])) if folder.parent.name == "snapshots" else (str(folder),)
    name = repo_folder_name(repo_id=str(source), repo_type="dataset")
    return (str(Path(constants.HF_HUB_CACHE, name).resolve()), f"hf://datasets/{source}@")


def locate(path: str, roots: tuple[str, ...]) -> str:
    """The place of a file of a set.

    Args:
        path (`str`): As a row names it: absolute, relative to the first root, or a URL, which may lead into a ZIP
            archive (`zip://a.jpg::/set/pictures.zip`).
        roots (`tuple[str]`): From `set_roots`.

    Returns:
        `str`: Where it is read.

    Raises:
        ValueError: If it is not part of the set: elsewhere on this machine, also by way of a link, or in the network.
    """
    in_archive, separator, file = path.rpartition("::")
    if "://" in file:
        inside = any("://" in root and file.startswith(root) for root in roots) and ".." not in file.split("/")
    else:
        file = os.path.realpath(os.path.join(roots[0], file))
        inside = any(Path(file).is_relative_to(root) for root in roots)
    if not inside or (in_archive and (not in_archive.startswith("zip://") or "::" in in_archive)):
        raise ValueError(
            f"it names the file {path}, which is not in {roots[0]}: of a set only its own files are read. Copy the"
            " picture there, or store its bytes in the set"
        )
    return f"{in_archive}{separator}{file}"


def read_file(value: dict, roots: tuple[str, ...] | None) -> bytes:
    """The bytes of a value of an image column, or of the file that it names.

    Args:
        value (`dict`): With the entries "bytes" and "path", as `datasets.Image` keeps an image.
        roots (`tuple[str]`, *optional*): From `set_roots`; without them, every file may be read.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If the value names no file, or one that is not part of the set.
    """
    if value["bytes"] is not None:
        return value["bytes"]
    if not value["path"]:
        raise ValueError("it has neither bytes nor a path")
    with fsspec.open(value["path"] if roots is None else locate(value["path"], roots)) as opened:
        return opened.read()


def _kind(of: pa.DataType) -> str | None:
    """What a column holds where `datasets` casts within a kind; None where it casts from others too."""
    if pa.types.is_string(of) or pa.types.is_large_string(of):
        return "text"
    return next((kind for kind in ("integer", "floating", "boolean") if getattr(pa.types, f"is_{kind}")(of)), None)


def check_tables(files: Iterable[str], skip_damaged: bool = False) -> None:
    """Looks at the ends of the local Parquet files of a set: `datasets` does not say which one it cannot read.

    Args:
        files (`Iterable[str]`): The files of a split; those that are no local Parquet are not looked at.
        skip_damaged (`bool`): Leave it to the reader what becomes of damaged files.

    Raises:
        ValueError: If one is damaged or has no rows, or if its columns are not those of the first; names it.
    """
    first = first_file = None
    for file in files:
        if not file.endswith(".parquet") or not os.path.isfile(file):
            continue
        try:
            metadata = pq.read_metadata(file)
            schema = metadata.schema.to_arrow_schema()
        except (OSError, pa.ArrowException) as error:
            if skip_damaged:
                continue
            raise ValueError(f"{file} is no whole Parquet file: {' '.join(str(error).split())}") from error
        if metadata.num_rows == 0:
            raise ValueError(f"{file} has no rows.")
        if first is None:
            first, first_file = schema, file
        for names, other, its_file in ((schema.names, first, first_file), (first.names, schema, file)):
            if lacking := [name for name in names if name not in other.names]:
                here = file if its_file is first_file else first_file
                raise ValueError(f"{its_file} has no column {', '.join(lacking)}, but {here} of the same set has.")
        for name in schema.names:
            kinds = _kind(first.field(name).type), _kind(schema.field(name).type)
            if None not in kinds and kinds[0] != kinds[1]:
                raise ValueError(
                    f"{file} has {schema.field(name).type} in column {name}, but {first_file} of the same set has"
                    f" {first.field(name).type}."
                )
