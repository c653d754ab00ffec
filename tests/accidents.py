"""What the tests of accidents share: processes that are killed, that print into a file, or that are two of one run."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


@contextmanager
def killed_at(part: str, number: int) -> Iterator[None]:
    """This process is killed when the `number`-th file below a folder `part` is to get its name."""
    replace_file, seen = os.replace, 0

    def deadly(source, target):
        nonlocal seen
        seen += part in Path(target).parts
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace_file(source, target)

    with mock.patch("os.replace", deadly):
        yield


def print_to(log: Path) -> None:
    """From now on, what this process and those that it starts print goes to the end of a file."""
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def two_ranks() -> list[dict[str, str]]:
    """The environments in which `accelerate launch` starts two processes that stay off the GPU."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": "2"}
    world["ACCELERATE_USE_CPU"] = "true"
    return [world | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
