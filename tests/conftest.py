"""What several test files set up alike."""

import os
import tempfile

import numpy as np
import pytest
from hub_server import HubServer
from PIL import Image, ImageDraw


def pytest_configure(config):
    # Caches of its own for each process that tests: nothing of the user's is read, and no two write the same file.
    home = tempfile.TemporaryDirectory(prefix="iedit-tests-")
    config.add_cleanup(home.cleanup)
    os.environ["HF_HOME"] = home.name
    # Processes side by side have one thread each: more of them than cores wait for each other, and tests take tenfold.
    if config.getoption("numprocesses", None):
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def cpu_without_bfloat16(monkeypatch):
    """What the command computes in is the same on every CPU, so that it can be compared."""
    import torch

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a picture, `in.png`, and a mask of its middle, `mask.png`."""
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in.png")
    mask = Image.new("L", (64, 48), 0)
    ImageDraw.Draw(mask).rectangle((16, 16, 47, 31), fill=255)
    mask.save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(tmp_path):
    """A Hub on loopback without any repositories; `hub.run` runs code in a process that knows no other one."""
    with HubServer(tmp_path) as server:
        yield server
