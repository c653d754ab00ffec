"""Work that can be stopped at any moment: files that are complete or absent, folders that one run has for itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A temporary name beside `file` to write to, which takes its place when the block ends without an error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Two workers may build one shard at the same time, when an engine repeats what it thinks is lost.
    partial = file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        yield partial
        # A machine that loses its power would otherwise keep the new name without the content.
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except OSError as error:
        # A full disk, for one, comes without the name of what could not be written.
        if error.errno is not None and error.filename is None:
            error.filename = str(file)
        raise
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def lock_folder(folder: Path, work: str) -> Iterator[None]:
    """Keeps others from writing to a folder until the block ends, or the process does, however that happens.

    Of the processes of one run, the main one takes the lock, before the others go on.

    Args:
        folder (`Path`): It has to be there.
        work (`str`): What is done in it, for the message: "build", "training", "evaluation".

    Raises:
        RuntimeError: If another process holds the lock.
    """
    # The system lets go of it with its process. It is no file that is removed: that would leave a moment for two.
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"Another {work} is at work on {folder}: wait for it, or choose another folder.") from None
    try:
        yield
    finally:
        lock.release()


def differences(found: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """What a folder's configuration has otherwise than that of a run which is to go on there, in words."""
    return [
        f"{name} was {found.get(name)!r} and is {config.get(name)!r}"
        for name in sorted(found.keys() | config.keys())
        if found.get(name) != config.get(name)
    ]
