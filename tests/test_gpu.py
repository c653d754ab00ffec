"""What only a GPU can show: `python -m pytest -m gpu`. Without one, a line says that none of it was run."""

import functools

import numpy as np
import pytest
import torch
from families import FAMILIES, HEIGHT, WIDTH, small_conditions  # noqa: F401
from PIL import Image

from diffusers_iedit import IEditPipeline, LocalEditor, mini
from diffusers_iedit.mini.judging import Judge


pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs CUDA, which is not here: nothing of it was run", allow_module_level=True)

HALVES = [torch.float16, torch.bfloat16]
COUNT = 32


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def iedit(dtype):
    return quiet(IEditPipeline.from_pretrained(mini.model_path(), dtype=dtype)).to("cuda")


def sd3(dtype):
    editor = LocalEditor.from_pretrained("mini-sd3", dtype=dtype).to("cuda")
    quiet(editor.pipe)
    return editor


FORMS = pytest.mark.parametrize("form", [iedit, sd3])


@functools.cache
def successes(form, dtype, count=COUNT):
    """Of edits of one thing's colour in scenes that no model saw, how many the judge finds right."""
    editor = form(dtype)
    judge = Judge.from_pretrained(mini.judge_path())
    right = 0
    for seed in range(count):
        scene = mini.render(seed, things=1)
        colours = [colour for colour in mini.COLOURS if colour != scene.thing.colour]
        target = scene.swap(colour=colours[seed % len(colours)])
        edit = editor(
            scene.image,
            target.caption,
            mask_image=scene.mask,
            mask_dilation=2,
            strength=0.7,
            guidance_scale=3.0,
            num_inference_steps=28,
            generator=torch.Generator().manual_seed(seed),
        )
        changed = (np.asarray(edit.images[0]) != np.asarray(scene.image)).any(axis=-1)
        assert not changed[np.asarray(edit.masks[0]) == 0].any()
        (seen,) = judge.look(edit.images, [target.mask])
        right += (seen.noun, seen.colour) == (target.thing.noun, target.thing.colour)
    return right


@FORMS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_edits_in_half_precision_succeed_as_in_float32(form, dtype):
    full, half = (successes(form, each) for each in (torch.float32, dtype))
    assert full >= 0.95 * COUNT
    assert half >= full - 1


def test_words_find_the_same_mask_in_half_precision():
    scene = mini.render(22)
    expected = np.asarray(iedit(torch.float32).predict_mask(scene.image, mask_prompt="red ball")[0]) > 0
    for dtype in HALVES:
        found = np.asarray(iedit(dtype).predict_mask(scene.image, mask_prompt="red ball")[0]) > 0
        assert (found & expected).sum() / (found | expected).sum() > 0.95


def edit(editor, seed=0):
    scene = mini.render(22)
    output = editor(
        scene.image,
        "an orange car and a red cat on green grass",
        mask_image=scene.mask,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(seed),
    )
    return np.asarray(output.images[0], dtype=np.float64)


@FORMS
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_an_offloaded_pipeline_edits_alike_and_twice(form, offload):
    expected = edit(form(torch.float32))
    editor = form(torch.float32).to("cpu")
    pipe = getattr(editor, "pipe", editor)
    getattr(pipe, offload)()
    for _ in range(2):
        assert np.abs(edit(editor) - expected).max() <= 2
    # The pipeline itself runs on.
    scene = mini.render(22)
    assert pipe(prompt="a red cat", image=scene.image, num_inference_steps=4).images


@FORMS
def test_a_compiled_denoiser_edits_alike(form):
    editor = form(torch.float32)
    expected = edit(editor)
    pipe = getattr(editor, "pipe", editor)
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(getattr(pipe, name)))
    # Sums in another order, through ten steps.
    assert np.abs(edit(editor) - expected).mean() <= 1


@pytest.mark.usefixtures("small_conditions")
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_keeps_the_outside_of_the_mask(name, dtype):
    source = Image.fromarray(np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    mask = Image.new("L", source.size)
    mask.paste(255, (20, 13, 71, 39))
    pipe = FAMILIES[name].pipe()
    before = dict(vars(pipe))
    settled = ("height", "width", "max_area", "_auto_resize")
    call = {key: value for key, value in FAMILIES[name].call.items() if key not in settled}
    editor = LocalEditor(pipe).to("cuda", dtype)
    try:
        output = editor(source, "a red car", mask_image=mask, processing_resolution=WIDTH, **call)
    finally:
        # The tests share its models.
        editor.to("cpu", torch.float32)
    changed = (np.asarray(output.images[0]) != np.asarray(source)).any(axis=-1)
    inside = np.asarray(mask) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5
    assert dict(vars(pipe)) == before
