"""Every script in `examples/` runs as its docstring says, on small models, and so does the notebook."""

import base64
import io
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import ModularPipelineBlocks, StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from families import FAMILIES
from notebook import code_cells, outputs_of
from PIL import Image, ImageChops


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(folder, monkeypatch):
    def run(name, *argv):
        monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return run


def changed(first, second):
    return (np.asarray(Image.open(first)) != np.asarray(Image.open(second))).any(axis=-1)


STEPS = ("--steps", "--num_inference_steps")
PHOTO = ("in.png", "mask.png", "a blue car", "edited.png", "--steps", "4")


def test_edit_mini(folder, run, capsys):
    run("edit_mini.py", "--seed", "0", "--colour", "purple", "--output-dir", "outputs")
    outside = np.asarray(Image.open("outputs/mask.png")) == 0
    difference = changed("outputs/source.png", "outputs/edit.png")
    assert difference.any()
    assert not difference[outside].any()
    assert " -> " in capsys.readouterr().out


def test_edit_photo(folder, run):
    StableDiffusionImg2ImgPipeline(**tiny_models.sd_components()).save_pretrained("model")
    run("edit_photo.py", *PHOTO, "--model", "model", "--processing-resolution", "32")
    difference = changed("in.png", "edited.png")
    assert difference.any()
    assert not difference[np.asarray(Image.open("mask.png")) == 0].any()


def only_the_mask_changed():
    difference, marked = changed("in.png", "edited.png"), np.asarray(Image.open("mask.png")) > 0
    return difference[marked].mean() > 0.5 and not difference[~marked].any()


def test_edit_sdxl(folder, run):
    StableDiffusionXLImg2ImgPipeline(**tiny_models.sdxl_components()).save_pretrained("model")
    arguments = ("in.png", "a blue car", "edited.png", "--model", "model", "--padding", "8")
    run("edit_sdxl.py", *arguments, "--mask", "mask.png", "--steps", "4")
    assert only_the_mask_changed()
    for finder in tiny_models.clipseg():
        finder.save_pretrained("mask_model")
    words = ("--mask-prompt", "car", "--mask-model", "mask_model", "--mask-threshold", "0.3")
    run("edit_sdxl.py", *arguments, *words, "--num_inference_steps", "4")
    assert changed("in.png", "edited.png").any()


def test_edit_flux(folder, run):
    FAMILIES["flux"].pipe().save_pretrained("model")
    run("edit_flux.py", *PHOTO, "--model", "model", "--padding", "8", "--resolution", "64")
    assert only_the_mask_changed()


def test_edit_kontext(folder, run):
    FAMILIES["flux-kontext"].pipe().save_pretrained("model")
    run("edit_kontext.py", *PHOTO, "--model", "model", "--padding", "8", "--resolution", "64")
    assert only_the_mask_changed()


def test_edit_several(folder, run):
    StableDiffusionXLImg2ImgPipeline(**tiny_models.sdxl_components()).save_pretrained("model")
    masks = [Image.new("L", (64, 48)) for _ in range(2)]
    masks[0].paste(255, (0, 0, 24, 24))
    masks[1].paste(255, (16, 16, 64, 32))
    edits = []
    for number, mask in enumerate(masks):
        mask.save(f"mask-{number}.png")
        edits += ["--edit", f"mask-{number}.png", "a blue car"]
    run("edit_several.py", "in.png", "edited.png", *edits, "--model", "model", "--padding", "4", "--steps", "4")
    ImageChops.lighter(*masks).save("mask.png")
    assert only_the_mask_changed()


def test_local_sdxl(folder, run):
    components = tiny_models.sdxl_components()
    # A VAE that encodes without noise, as trained ones nearly do: what is left to the seed is the edit.
    with torch.no_grad():
        components["vae"].quant_conv.weight[4:] = 0
        components["vae"].quant_conv.bias[4:] = -30
    StableDiffusionXLImg2ImgPipeline(**components).save_pretrained("model")
    Image.new("L", (64, 48), 0).save("black.png")
    results = {}
    for mask in ("mask", "black"):
        for seed in (0, 1):
            argv = ["in.png", f"{mask}.png", "a blue car", f"{mask}-{seed}.png", "--seed", seed]
            run("local_sdxl.py", *argv, "--model", "model", "--size", "64", STEPS[seed], "4")
            results[mask, seed] = np.asarray(Image.open(f"{mask}-{seed}.png")).astype(int)
    assert results["mask", 0].shape == (48, 64, 3)
    assert np.abs(results["mask", 0] - results["mask", 1]).max() > 10
    assert np.abs(results["black", 0] - results["black", 1]).max() <= 1


def test_custom_pipeline(folder, run):
    StableDiffusionImg2ImgPipeline(**tiny_models.sd_components()).save_pretrained("model")
    run("custom_pipeline.py", *PHOTO[:4], "--num_inference_steps", "4", "--model", "model")
    difference = changed("in.png", "edited.png")
    assert difference.any()
    assert not difference[np.asarray(Image.open("mask.png")) == 0].any()


def test_push_blocks(folder, run):
    run("push_blocks.py", "--output-dir", "blocks")
    blocks = ModularPipelineBlocks.from_pretrained("./blocks", trust_remote_code=True)
    assert list(blocks.sub_blocks) == ["find_mask", "mask_scheduler"]


@pytest.mark.slow
def test_the_notebook_runs_and_makes_the_pictures_that_stand_in_it():
    notebook = EXAMPLES / "quickstart.ipynb"
    number_of_pictures = 0
    for cell, made in zip(code_cells(notebook), outputs_of(notebook), strict=True):
        shown = [output["data"]["image/png"] for output in cell["outputs"]]
        assert len(shown) == (made is not None), "".join(cell["source"])
        for data in shown:
            number_of_pictures += 1
            stored = Image.open(io.BytesIO(base64.b64decode(data)))
            assert stored.size == made.size
            # Other machines round sums otherwise.
            assert np.abs(np.asarray(stored).astype(int) - np.asarray(made).astype(int)).mean() < 1
    assert number_of_pictures == 5
    assert notebook.stat().st_size < 300_000


def test_every_example_is_listed_and_run():
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    tests = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    index = (EXAMPLES / "README.md").read_text()
    assert scripts <= tests
    assert all(f"({script})" in index for script in (*scripts, "quickstart.ipynb"))
