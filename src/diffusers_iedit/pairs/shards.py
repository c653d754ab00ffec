"""Files that are complete or absent: how every stage leaves its output, and how a later run knows that it did."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..resuming import replacing


@dataclass
class Marker:
    """What is known of a finished shard: its marker lies beside it and is written last."""

    rows_in: int
    rows_out: int
    dropped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    model_seconds: float = 0.0
    # Of the shard itself, in bytes: a shard of another size was cut off or replaced.
    size: int = 0
    # What a part of a collection was read into; other stages leave one shard each, the marker's own.
    shards: list[str] = field(default_factory=list)


def _marker_file(file: Path) -> Path:
    return file.with_suffix(".json")


def write_marker(file: Path, marker: Marker) -> None:
    """Declares `file` finished."""
    marker.size = file.stat().st_size if file.exists() else 0
    with replacing(_marker_file(file)) as partial:
        partial.write_text(json.dumps(asdict(marker)))


def read_marker(file: Path) -> Marker | None:
    """The marker of a finished shard, or None if the shard is not there whole."""
    try:
        marker = Marker(**json.loads(_marker_file(file).read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    size = file.stat().st_size if file.exists() else 0
    return marker if size == marker.size else None


def write_table(file: Path, table: pa.Table) -> None:
    """Writes an Arrow file, which `read_table` can map into memory."""
    with replacing(file) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)


def read_table(file: Path) -> pa.Table:
    """The table of an Arrow file, mapped: only what is used of it is read."""
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()


def write_array(file: Path, array: np.ndarray) -> None:
    """Writes a .npy file."""
    # Given a file, NumPy does not say that the disk is full when it is.
    encoded = io.BytesIO()
    np.save(encoded, array)
    with replacing(file) as partial:
        partial.write_bytes(encoded.getbuffer())
