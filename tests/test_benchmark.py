"""The benchmarks of an edit and of a training step run, and compare what they say they compare."""

import importlib
import json
import logging
import re
import runpy
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from diffusers_iedit.acceleration import fast_dtype


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(autouse=True)
def levels():
    """Scripts settle what is logged for a process of their own, and the next tests read logs."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "diffusers_iedit")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.fixture
def train_step():
    return importlib.import_module("train_step")


def figures_of(script, arguments, tmp_path, monkeypatch):
    """What a script writes to --json."""
    argv = [str(BENCHMARKS / script), *arguments, "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(argv[0], run_name="__main__")
    return json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.slow
def test_compare_pipelines(tmp_path, monkeypatch, capsys):
    arguments = ["--size", "mini", "--steps", "2", "--repeats", "2"]
    figures = figures_of("compare_pipelines.py", arguments, tmp_path, monkeypatch)
    table = capsys.readouterr().out
    assert figures["settings"]["steps"] == 2
    assert set(figures["results"]) == {"img2img", "inpaint", "iedit"}
    for method, result in figures["results"].items():
        assert len(result["seconds"]) == 2
        assert result["median_seconds"] > 0
        assert result["peak_mib"] > result["peak_over_models_mib"] > 0
        assert f"\n{method} " in table
    assert figures["results"]["img2img"]["median_time_ratio"] == figures["results"]["img2img"]["peak_ratio"] == 1


@pytest.mark.slow
def test_train_step_compares_with_the_plain_step_of_the_same_option(tmp_path, monkeypatch, capsys):
    arguments = ["--variants", "global+paired/tiny", "--repeats", "2", "--batch_size", "2"]
    figures = figures_of("train_step.py", arguments, tmp_path, monkeypatch)
    table = capsys.readouterr().out
    assert figures["settings"]["batch_size"] == 2
    assert list(figures["results"]) == ["plain", "global+paired/tiny"]
    for variant, result in figures["results"].items():
        assert len(result["seconds"]) == 2
        assert result["peak_mib"] > result["peak_over_models_mib"] > 0
        assert f"\n{variant} " in table
    assert figures["results"]["plain"]["median_time_ratio"] == 1
    assert figures["results"]["global+paired/tiny"]["median_time_ratio"] > 1
    loading = figures["loading"]
    assert 0 < loading["waiting_seconds"] < loading["step_seconds"]
    assert f"{loading['waiting_seconds'] / loading['step_seconds']:.2%} of a plain step" in table


def test_every_row_of_table_2_is_measured_with_both_decoders(train_step):
    rows = ("global+paired", "global+ldm+loc", "global+ldm+loc+perc", "loc+global+mask+perc")
    assert {f"{row}/{decoder}" for row in rows for decoder in ("vae", "tiny")} < set(train_step.VARIANTS)
    for variant in train_step.VARIANTS.values():
        assert variant.baseline in train_step.VARIANTS.values()
        assert (variant.baseline.loss, variant.baseline.option) == ("plain", variant.option)


def test_cached_latents_and_checkpointing_are_the_same_training(train_step):
    variants = [variant for variant in train_step.VARIANTS.values() if variant.loss in ("plain", train_step.EQ_12)]
    training = train_step.Training("mini", variants, "cpu", torch.float32)
    batch = train_step.make_batch(Namespace(resolution=64, batch_size=2))
    losses = {}
    for variant in variants:
        losses.setdefault((variant.loss, variant.decoder), []).append(
            training.loss(variant, training.prepare(variant, batch)).item()
        )
    assert len(losses) == 3
    for values in losses.values():
        assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert len({values[0] for values in losses.values()}) == 3


def test_a_step_trains_the_block_whose_turn_it_is(train_step):
    variant = train_step.VARIANTS["loc+global+mask+perc/tiny"]
    training = train_step.Training("mini", [variant], "cpu", torch.float32)
    batch = train_step.make_batch(Namespace(resolution=64, batch_size=2))
    for number, block in enumerate(("down_blocks", "mid_block")):
        before = {name: parameter.clone() for name, parameter in training.unet.named_parameters()}
        training.step(variant, batch, number)
        changed = {name for name, parameter in training.unet.named_parameters() if not parameter.equal(before[name])}
        assert {name.split(".")[0] for name in changed} - {"conv_in"} == {block}


@pytest.mark.slow
def test_computed_memory_counts_every_tensor_once(train_step):
    args = Namespace(resolution=384, batch_size=1)
    plain, eq_12, checkpointing = (
        train_step.compute_memory(train_step.VARIANTS[name], args)
        for name in ("plain", "loc+global+mask+perc/vae", "loc+global+mask+perc/vae/checkpointing")
    )
    # Millions of parameters of Stable Diffusion 1.4: the UNet's, the VAE's, the text encoder's; the blocks to train.
    unet, vae, text_encoder, trained = 859.5, 83.7, 123.1, 346.7
    assert plain["computed_weights_mib"] == pytest.approx(
        (4 * (unet + vae) + 2 * text_encoder) * 1e6 / 2**20, rel=1e-3
    )
    assert plain["computed_adam_mib"] == pytest.approx(8 * trained * 1e6 / 2**20, rel=1e-3)
    for memory in (plain, eq_12):
        parts = [memory[f"computed_{part}_mib"] for part in ("weights", "adam", "rest")]
        assert sum(parts) == pytest.approx(memory["computed_peak_mib"])
    assert plain["computed_rest_mib"] < checkpointing["computed_rest_mib"] < eq_12["computed_rest_mib"]


# The tables


@pytest.fixture
def tables():
    return importlib.import_module("tables")


@pytest.mark.parametrize("part", ["shipped", "trained"])
def test_the_tables_are_those_of_the_results_beside_them(tables, part):
    results = json.loads((tables.HERE / f"{part}.json").read_text())
    written = {
        "shipped": lambda: ("table-1", tables.write_table_1(results)),
        "trained": lambda: ("table-2", tables.write_table_2(results, tables.row_variants(Path("outputs/mini")))),
    }
    name, text = written[part]()
    assert (tables.HERE / f"{name}.md").read_text() == text.lstrip() + "\n"
    assert text.strip() in (BENCHMARKS / "README.md").read_text()


def test_the_readme_shows_what_table_1_says(tables):
    summary = json.loads((tables.HERE / "shipped.json").read_text())["summary"]["real"]
    readme = (BENCHMARKS.parent / "README.md").read_text()
    for method in ("sdedit", "sdedit-m", "iedit", "iedit-m", "inpaint", "instruct-pix2pix"):
        figures = [f"{summary[method][name]['mean']:.3f}" for name in ("success", "clip_score", "ssim_not_m")]
        assert f" | {' | '.join(figures)} |\n" in readme


def test_the_results_were_taken_with_the_settings_that_were_chosen(tables):
    chosen = json.loads((tables.HERE / "settings.json").read_text())
    for part in ("shipped", "trained"):
        results = json.loads((tables.HERE / f"{part}.json").read_text())
        settings = results["settings"]
        found = [settings[name] for name in ("strength", "guidance_scale", "num_inference_steps", "mask_dilation")]
        assert found == list(chosen.values())
        assert (settings["num_examples"], len(results["examples"])) == (None, 320)


def test_each_row_of_table_2_has_three_seeds(tables):
    results = json.loads((tables.HERE / "trained.json").read_text())
    rows = tables.row_variants(Path("outputs/mini"))
    assert len(rows) == 5
    for variants in rows.values():
        assert len(set(variants)) == 3
        assert set(variants) <= results["variants"].keys()


def test_one_row_s_seeds_are_averaged_example_by_example(tables):
    examples = [
        {"results": {"a": {"success": 0.0}, "b": {"success": 1.0}}},
        {"results": {"a": {"success": 1.0}, "b": {"success": 1.0}}},
    ]
    assert tables.over_seeds({"examples": examples}, ["a", "b"], "success").tolist() == [0.5, 1.0]


@pytest.mark.slow
def test_regions_measures_success_seams_and_costs(tmp_path, monkeypatch, capsys):
    arguments = ["--only", "grids", "seam", "--grids", "2", "--examples", "1"]
    figures = figures_of("regions.py", arguments, tmp_path, monkeypatch)
    ways = figures["grids"]["2"]
    assert set(ways) == {"given mask, cut out", "words alone, cut out", "small copy", "whole frame"}
    for found in ways.values():
        assert found["success"] in (0, 1)
        assert found["edits"] == 1
    assert ways["whole frame"]["seconds"] > ways["given mask, cut out"]["seconds"] > 0
    for rows in figures["seam"].values():
        assert 0 < rows["matched"]["rim"] < rows["as decoded"]["rim"]
    printed = capsys.readouterr().out
    assert "given mask, cut out" in printed
    assert "guidance 7.5: rim" in printed


@pytest.mark.slow
def test_regions_finds_the_same_however_many_processes_share_the_edits(tmp_path, monkeypatch):
    arguments = ["--only", "grids", "--grids", "2", "--examples", "1", "--processes"]
    alone, shared = (figures_of("regions.py", [*arguments, n], tmp_path, monkeypatch)["grids"]["2"] for n in "12")
    assert all(found.pop("seconds") > 0 for ways in (alone, shared) for found in ways.values())
    assert alone == shared


@pytest.mark.slow
def test_a_small_thing_in_a_large_picture_is_changed():
    regions = importlib.import_module("regions")
    ways = ("given mask, cut out", "words alone, cut out")
    given, words = ([regions.measure_task(regions.Task(4, way, number)) for number in range(8)] for way in ways)
    assert [success for success, _ in given + words] == [True] * 16
    # In the time of one edit at the model's size; the whole frame takes ten times as long.
    start = time.process_time()
    regions.edit_of(regions.load()[0], "scene")()
    assert statistics.median(seconds for _, seconds in given) < 2 * (time.process_time() - start)


@pytest.mark.slow
def test_an_edit_leaves_no_seam(tmp_path, monkeypatch):
    figures = figures_of("regions.py", ["--only", "seam", "--examples", "8"], tmp_path, monkeypatch)
    for rows in figures["seam"].values():
        assert rows["matched"]["rim"] <= 0.4 * rows["as decoded"]["rim"]
        assert rows["matched"]["psnr"] >= rows["as decoded"]["psnr"]


# An edit of a thing in a large picture


@pytest.fixture
def local_edit():
    return importlib.import_module("local_edit")


def test_each_row_of_local_edit_has_one_lever_more(local_edit):
    found = []
    for row in range(len(local_edit.ROWS)):
        pipe, settings = local_edit.load(row, "mini", "cpu")
        laid_out = pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        is_all_float32 = {model.dtype for model in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
        assert is_all_float32 == (row < local_edit.PRECISION or fast_dtype("cpu") == torch.float32)
        names = (type(each).__name__ for each in (pipe, pipe.scheduler, pipe.vae))
        steps = int(settings["num_inference_steps"] * settings["strength"])
        found.append((*names, laid_out, settings["guidance_scale"], *local_edit.share_out(row, steps)))
    assert found == [
        ("StableDiffusionImg2ImgPipeline", "DDIMScheduler", "AutoencoderKL", False, 7.5, 40, 0),
        ("IEditPipeline", "DDIMScheduler", "AutoencoderKL", False, 7.5, 40, 0),
        ("IEditPipeline", "DDIMScheduler", "AutoencoderKL", True, 7.5, 40, 0),
        ("IEditPipeline", "DPMSolverMultistepScheduler", "AutoencoderKL", True, 3.0, 9, 0),
        ("IEditPipeline", "DPMSolverMultistepScheduler", "AutoencoderKL", True, 3.0, 5, 4),
        ("IEditPipeline", "DPMSolverMultistepScheduler", "AutoencoderTiny", True, 3.0, 5, 4),
    ]


def test_local_edit_measures_each_row_and_adds_up_what_it_measured(local_edit, tmp_path, monkeypatch, capsys):
    def here(row, args):
        return local_edit.measure_edit(row, args.size, args.device, args.run_steps)

    monkeypatch.setattr(local_edit, "measure_in_a_process", here)
    monkeypatch.setattr(local_edit, "GRID", 2)
    monkeypatch.setitem(local_edit.DEFAULTS, "num_inference_steps", 5)
    monkeypatch.setitem(local_edit.acceleration.FEW_STEPS, "num_inference_steps", 3)
    files = [tmp_path / "figures.json", tmp_path / "table.md"]
    arguments = f"--size mini --device cpu --examples 1 --json {files[0]} --markdown {files[1]}".split()
    monkeypatch.setattr(sys, "argv", ["local_edit.py", *arguments])
    local_edit.main()

    figures = json.loads(files[0].read_text())
    cost, table = figures["cost"], files[1].read_text()
    assert table in capsys.readouterr().out
    assert list(cost) == list(figures["quality"]) == list(local_edit.ROWS)
    assert [found["steps run"] for found in cost.values()] == [1, 1, 1, 1, 2, 2]
    assert cost["stock"]["speed"] == cost["stock"]["memory"] == 1
    for name, line in zip(local_edit.ROWS, table.splitlines()[2:], strict=True):
        found = cost[name]
        assert found["peak MiB"] > 0
        assert found["speed"] == pytest.approx(cost["stock"]["seconds"] / found["seconds"])
        parts, total = line.split("|")[2].split("=")
        terms = [term.split(" x ") for term in parts.split(" + ")]
        added = sum(float(term[0]) * float(term[-1]) if len(term) == 2 else float(term[0]) for term in terms)
        assert added == pytest.approx(float(total), rel=0.02)
        assert {figures["quality"][name]["success"]} <= {0, 1}
        assert 0 < figures["quality"][name]["psnr"] < 60
    assert cost["region"]["guided step"] < cost["stock"]["guided step"]


# Many pictures


def batch_table(arguments, monkeypatch, capsys):
    """What `batch.py` prints, by batch size: seconds, percent outside the models, percent that differs, most."""
    monkeypatch.setattr(sys, "argv", ["batch.py", *arguments.split()])
    runpy.run_path(str(BENCHMARKS / "batch.py"), run_name="__main__")
    rows = [re.findall(r"[\d.]+", line) for line in capsys.readouterr().out.splitlines()[2:]]
    return {int(size): tuple(map(float, figures)) for size, *figures in rows}


def test_batch_measures_seconds_and_the_models_share(monkeypatch, capsys):
    table = batch_table("--jobs 2 --steps 2 --batch-sizes 1 2", monkeypatch, capsys)
    assert table.keys() == {1, 2}
    for seconds, outside, _, most in table.values():
        assert seconds > 0
        assert 0 < outside < 100
        assert most <= 1


@pytest.mark.slow
def test_in_batches_of_16_a_tenth_is_spent_outside_the_models_at_most(monkeypatch, capsys):
    table = batch_table("--jobs 16 --batch-sizes 1 16", monkeypatch, capsys)
    assert table[16][1] <= 10
    assert table[16][0] < 0.9 * table[1][0]
