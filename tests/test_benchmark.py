"""`benchmarks/compare_pipelines.py` runs and compares what it says it compares."""

import json
import runpy
import sys
from pathlib import Path


SCRIPT = Path(__file__).parents[1] / "benchmarks" / "compare_pipelines.py"


def test_compare_pipelines(tmp_path, monkeypatch, capsys):
    argv = ["--size", "mini", "--steps", "2", "--repeats", "2", "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *argv])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    table = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["steps"] == 2
    assert set(figures["results"]) == {"img2img", "inpaint", "iedit"}
    for method, result in figures["results"].items():
        assert len(result["seconds"]) == 2
        assert result["median_seconds"] > 0
        assert result["peak_mib"] > result["peak_over_models_mib"] > 0
        assert f"\n{method} " in table
    assert figures["results"]["img2img"]["median_time_ratio"] == figures["results"]["img2img"]["peak_ratio"] == 1
