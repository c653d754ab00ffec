"""What only a GPU can show: `python -m pytest -m gpu`. Without one, a line says that none of it was run."""

import functools
import os
from unittest import mock

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
    scenes = [mini.render(seed, things=1) for seed in range(count)]
    targets = []
    for seed, scene in enumerate(scenes):
        colours = [colour for colour in mini.COLOURS if colour != scene.thing.colour]
        targets.append(scene.swap(colour=colours[seed % len(colours)]))
    edit = form(dtype)(
        [scene.image for scene in scenes],
        [target.caption for target in targets],
        mask_image=[scene.mask for scene in scenes],
        mask_dilation=2,
        strength=0.7,
        guidance_scale=3.0,
        num_inference_steps=28,
        generator=[torch.Generator().manual_seed(seed) for seed in range(count)],
    )
    for scene, image, mask in zip(scenes, edit.images, edit.masks, strict=True):
        changed = (np.asarray(image) != np.asarray(scene.image)).any(axis=-1)
        assert not changed[np.asarray(mask) == 0].any()
    seen = Judge.from_pretrained(mini.judge_path()).look(edit.images, [target.mask for target in targets])
    things = [target.thing for target in targets]
    return sum((v.noun, v.colour) == (t.noun, t.colour) for v, t in zip(seen, things, strict=True))


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


# Training and building, where their libraries are


@pytest.fixture(scope="module")
def small_pairs():
    return pytest.importorskip("small_pairs")


@pytest.fixture(scope="module")
def pairs(small_pairs, tmp_path_factory):
    return small_pairs.write_pairs(tmp_path_factory.mktemp("made") / "pairs", small_pairs.make_rows())


def train(small_pairs, pairs, output_dir, *options):
    """Twelve steps of the mini model, on CUDA."""
    argv = small_pairs.arguments(pairs, mini.model_path(), output_dir, "--resolution", 64, "--max_train_steps", 12)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    small_pairs.train([*argv, "--learning_rate", "1e-4", *map(str, options)], cpu=False)
    assert torch.cuda.max_memory_allocated() > before
    return small_pairs.unet(output_dir)


@functools.cache
def float32_loss(small_pairs, pairs):
    """Of the first step."""
    train(small_pairs, pairs, pairs.parent / "float32", "--max_train_steps", 1)
    return small_pairs.losses(pairs.parent / "float32")[0]["loss"]


def moved(weights, others):
    """The names of the weights that differ, and how far apart all of them are."""
    apart = {name: (weights[name].float() - values.float()).norm() for name, values in others.items()}
    return {name for name, distance in apart.items() if distance}, torch.stack([*apart.values()]).norm()


TRAININGS = {
    "plain": (),
    "8-bit Adam": ("--use_8bit_adam",),
    "gradient checkpointing and LoRA": ("--gradient_checkpointing", "--lora_rank", 2),
}


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_training_in_fp16(options, small_pairs, pairs, tmp_path):
    if "--use_8bit_adam" in options:
        pytest.importorskip("bitsandbytes")
    if "--lora_rank" in options:
        pytest.importorskip("peft")
    trained = train(small_pairs, pairs, tmp_path / "model", "--mixed_precision", "fp16", *options)
    assert {values.dtype for values in trained.values()} == {torch.float32}
    assert all(values.isfinite().all() for values in trained.values())
    # The scaler of fp16 leaves out the first steps, until it has found its scale.
    names, _ = moved(trained, small_pairs.unet(mini.model_path()))
    assert {name.split(".")[0] for name in names} >= {"down_blocks", "mid_block"}
    assert not {name.split(".")[0] for name in names} & {"up_blocks", "conv_out"}
    assert (tmp_path / "model/lora").exists() == ("--lora_rank" in options)
    found = [line["loss"] for line in small_pairs.losses(tmp_path / "model")]
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(float32_loss(small_pairs, pairs), rel=0.05)


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_training_that_broke_off_ends_as_one_that_did_not(precision, small_pairs, pairs, tmp_path):
    """To 2 % of what the training changed, and 0.5 % of the losses.

    A GPU adds in another order each time. That is 1e-7 of a gradient, but Adam takes full steps from the smallest
    ones: 0.1 % of a loss after eight steps.
    """
    options = ("--checkpointing_steps", 6, "--mixed_precision", precision)
    undisturbed = train(small_pairs, pairs, tmp_path / "undisturbed", *options)

    def broken():
        raise KeyboardInterrupt

    with small_pairs.calling("small_pairs.train_iedit.batch_loss", 9, broken), pytest.raises(KeyboardInterrupt):
        train(small_pairs, pairs, tmp_path / "model", *options)
    resumed = train(small_pairs, pairs, tmp_path / "model", *options, "--resume_from_checkpoint", "latest")
    _, apart = moved(resumed, undisturbed)
    _, way = moved(undisturbed, small_pairs.unet(mini.model_path()))
    assert apart <= 0.02 * way
    for line, expected in zip(*map(small_pairs.losses, (tmp_path / "model", tmp_path / "undisturbed")), strict=True):
        assert line == pytest.approx(expected, rel=5e-3)


def test_the_builder_in_fp16_makes_the_pairs_that_it_makes_in_float32_on_a_cpu(tmp_path):
    small_build = pytest.importorskip("small_build")
    state = pytest.importorskip("accelerate.state").PartialState
    for library in ("nltk", "faiss"):
        pytest.importorskip(library)
    pool = small_build.write_pool(tmp_path / "pool", range(200_000, 200_000 + small_build.COUNT))
    rows = {}
    try:
        for device, cpu in (("cuda", "false"), ("cpu", "true")):
            state._reset_state()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with mock.patch.dict(os.environ, ACCELERATE_USE_CPU=cpu):
                small_build.build(tmp_path / device, small_build.options(pool))
            assert (torch.cuda.max_memory_allocated() > before) == (device == "cuda")
            rows[device] = small_build.rows(tmp_path / device)
    finally:
        state._reset_state()
    columns = ["source_caption", "edit_prompt", "source_term", "target_term"]
    found, expected = (
        {tuple(row.values()) for row in rows[device].select(columns).to_pylist()} for device in ("cuda", "cpu")
    )
    # A caption, a neighbour or a mask at a threshold may fall to the other side.
    assert len(expected) > 5
    assert len(found & expected) >= 0.9 * len(found | expected)
