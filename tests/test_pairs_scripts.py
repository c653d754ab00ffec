"""The scripts around the builder: the weight they recommend, what they measure against the truth, what it costs."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_iedit import mini


ROOT = Path(__file__).parents[1]
TRAINING, BENCHMARK = ROOT / "training", ROOT / "benchmarks" / "build_dataset.py"


def run(script, *arguments):
    """A script in a process of its own; what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    result = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def mine(folder, count):
    """A mined set of `make_pool.py`'s pictures, as the guide's first recipe makes it; its folder, and the truth."""
    run(TRAINING / "mini" / "make_pool.py", "--count", count, "--output_dir", folder / "pool")
    run(
        TRAINING / "build_dataset.py",
        *("--source", folder / "pool", "--output_dir", folder / "pairs", "--shard_size", 250),
        *("--caption_model", "mini", "--clip_model", "mini", "--mask_model", "mini"),
        *("--text_weight", 0.8, "--min_mask_iou", 0.3, "--max_hypernym_levels", 8),
        *("--vocabulary", *mini.NOUNS, *mini.COLOURS),
    )
    return folder / "pairs", folder / "pool-truth.parquet"


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    return mine(tmp_path_factory.mktemp("mined"), 200)


@pytest.mark.slow
def test_the_weight_recommended_shows_nine_tenths_of_the_most_edits(mined):
    printed = run(TRAINING / "recommend_text_weight.py", "--pairs", mined[0], "--weights", 0.1, 0.6, 0.9)
    shares = {
        float(weight): float(share) for weight, share in re.findall(r"^ +(0\.\d+) +([\d.]+)%", printed, re.MULTILINE)
    }
    assert list(shares) == [0.1, 0.6, 0.9]
    assert shares[0.1] < shares[0.9] / 2
    expected = min(weight for weight, share in shares.items() if share >= 0.9 * max(shares.values()))
    assert f"recommended: --text_weight {expected:g} " in printed


def measured(pairs, truth, folder):
    run(TRAINING / "mini" / "measure_pairs.py", "--pairs", pairs, "--truth", truth, "--json", folder / "measured.json")
    return {result["what"].strip(): result for result in json.loads((folder / "measured.json").read_text())}


@pytest.mark.slow
def test_captions_edits_and_masks_are_measured_against_the_truth(mined, tmp_path):
    results = measured(*mined, tmp_path)
    assert results["exactly right"]["value"] >= 0.95
    assert results["valid swaps"]["value"] >= 0.98
    assert results["mean IoU of M_1 with the source's thing"]["value"] >= 0.75
    alone = [results[f"{name} alone: thing and colour right"]["value"] for name in ("image", "text")]
    assert alone[0] < alone[1]


@pytest.mark.slow
def test_pairs_mined_from_a_larger_pool_reach_every_bar(tmp_path):
    results = measured(*mine(tmp_path, 4000), tmp_path)
    bars = {what: result for what, result in results.items() if result["bar"] is not None}
    assert len(bars) == 5
    for what, result in bars.items():
        assert result["value"] >= result["bar"], what


@pytest.mark.slow
def test_the_benchmark_gives_each_stage_its_rows_a_second(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), "--count", "24", "--json", str(tmp_path / "figures.json")])
    runpy.run_path(str(BENCHMARK), run_name="__main__")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["report"]["rows_in"] == 24
    assert 0 < figures["model_seconds"] < figures["seconds"]
    table = capsys.readouterr().out
    for stage in ("read source", "caption", "edit", "embed source", "embed prompt", "retrieve", "mask", "write"):
        assert re.search(rf"^{stage} +\d+ +\d+", table, re.MULTILINE)
