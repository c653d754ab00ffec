"""An install as people do it: into a fresh environment, with the newest versions that the bounds allow."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_an_install_without_constraints_opens_every_door(tmp_path):
    # From a copy, as pip builds in the source's folder.
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    environment = {name: value for name, value in os.environ.items() if name not in ("PIP_CONSTRAINT", "PYTHONPATH")}

    def run(*argv):
        result = subprocess.run(list(map(str, argv)), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    install = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    run(*install, "torch==2.13.0")
    run(*install, ".[test]")
    print(run(python, "-m", "pip", "list"))  # Shown when the tests fail.
    tests = [ROOT / "tests" / name for name in ("test_loading.py", "test_examples.py")]
    run(python, "-m", "pytest", "-p", "no:cacheprovider", *tests)
