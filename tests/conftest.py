"""What several test files set up alike."""

import numpy as np
import pytest
from hub_server import HubServer
from PIL import Image, ImageDraw


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
