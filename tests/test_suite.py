"""What the tests themselves rest on: caches of their own, and one thread each where they run side by side."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
from diffusers.utils import constants
from huggingface_hub import constants as hub_constants


def test_nothing_is_written_to_the_users_caches():
    for folder in (hub_constants.HF_HOME, constants.HF_MODULES_CACHE, hub_constants.HF_TOKEN_PATH):
        assert Path(tempfile.gettempdir()) in Path(folder).parents


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="of `pytest -n 2`, as `make test` runs it")
def test_processes_side_by_side_have_one_thread_each():
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert torch.get_num_threads() == 1
