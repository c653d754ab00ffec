"""What makes edits faster leaves them what they are: precision, layout, few steps, guidance in some, a tiny VAE."""

import os
import re

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from families import FAMILIES, WIDTH, small_conditions  # noqa: F401
from PIL import Image
from test_loading import ip_adapter_weights

from diffusers_iedit import IEditPipeline, LocalEditor, cli, mini
from diffusers_iedit.acceleration import FEW_STEPS, GuidanceCutoffCallback, fast_dtype, few_steps, prepare
from diffusers_iedit.mini.judging import Judge


SCENES = [mini.render(seed, things=1) for seed in range(2)]
# With a stock scheduler and default settings; `few_steps` is for these.
GUIDED = ["sd", "sdxl", "kolors", "sd3"]


@pytest.fixture(scope="module")
def mini_pipe():
    pipe = IEditPipeline.from_pretrained(mini.model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mini_editor():
    editor = LocalEditor.from_pretrained("mini-sd3")
    editor.pipe.set_progress_bar_config(disable=True)
    return editor


@pytest.fixture(scope="module")
def judge():
    return Judge.from_pretrained(mini.judge_path())


def colour_of(number):
    colours = [colour for colour in mini.COLOURS if colour != SCENES[number].thing.colour]
    return SCENES[number].swap(colour=colours[0])


def edit(pipe, numbers=(0, 1), results=1, **settings):
    """Each of these scenes with its thing in another colour."""
    return pipe(
        image=[SCENES[number].image for number in numbers],
        prompt=[colour_of(number).caption for number in numbers],
        mask_image=[SCENES[number].mask for number in numbers],
        num_images_per_prompt=results,
        generator=[torch.Generator().manual_seed(10 * n + k) for n in numbers for k in range(results)],
        **{"strength": 0.7, "mask_dilation": 2} | settings,
    )


def assert_outside_is_kept(output):
    for number, image, mask in zip((0, 1), output.images, output.masks, strict=True):
        changed = (np.asarray(image) != np.asarray(SCENES[number].image)).any(axis=-1)
        assert not changed[np.asarray(mask) == 0].any()
        assert changed.any()


def shows_the_colour(judge, output):
    seen = judge.look(output.images, [scene.mask for scene in SCENES])
    return [verdict.colour for verdict in seen] == [colour_of(number).thing.colour for number in (0, 1)]


# Precision and layout


@pytest.mark.parametrize(
    ("device", "of_transformer", "capabilities", "expected"),
    [
        ("cuda", False, {}, torch.float16),
        (torch.device("cuda", 1), True, {}, torch.bfloat16),
        ("cpu", False, {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", True, {"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ("cpu", False, {"avx512_f": True, "avx512_bf16": False}, torch.float32),
        ("mps", False, {"avx512_bf16": True}, torch.float32),
    ],
)
def test_the_precision_is_the_fastest_that_the_machine_has(
    monkeypatch, device, of_transformer, capabilities, expected
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert fast_dtype(device, of_transformer) == expected


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_prepared_pipeline_has_the_fastest_precision_and_layout(monkeypatch, has_bfloat16):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16})
    mask_model, mask_processor = tiny_models.clipseg()
    pipe = IEditPipeline(**tiny_models.sd_components(), mask_model=mask_model, mask_processor=mask_processor)
    assert prepare(pipe, "cpu") is pipe
    for model in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.mask_model):
        assert model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    for model in (pipe.unet, pipe.vae):
        convolutions = [each.weight for each in model.modules() if isinstance(each, torch.nn.Conv2d)]
        assert convolutions
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)


def test_what_was_loaded_in_the_precision_keeps_its_parts_in_float32():
    editor = LocalEditor.from_pretrained("mini-sd3", dtype=torch.bfloat16)
    # As transformers has it of a T5 in half precision.
    layer = editor.pipe.text_encoder_3.encoder.block[0].layer[1].DenseReluDense.wo.float()
    prepare(editor, "cpu", torch.bfloat16)
    assert (layer.weight.dtype, editor.dtype) == (torch.float32, torch.bfloat16)


def test_the_vae_of_a_video_model_stays_in_its_layout():
    editor = LocalEditor(FAMILIES["qwen-image"].pipe())
    assert any(weight.ndim == 5 for weight in editor.pipe.vae.parameters())
    assert prepare(editor, "cpu").dtype == torch.float32


@pytest.mark.parametrize("form", ["mini_pipe", "mini_editor"])
def test_the_background_is_exact_in_bfloat16(form, request):
    pipe = request.getfixturevalue(form)
    try:
        output = edit(prepare(pipe, "cpu", torch.bfloat16), num_inference_steps=2)
    finally:
        pipe.to(torch.float32)
    assert_outside_is_kept(output)


# Few steps


@pytest.mark.parametrize("form", ["mini_pipe", "mini_editor"])
def test_few_steps_make_the_same_edit_and_the_pipeline_stays_as_it_is(form, request, judge):
    pipe = request.getfixturevalue(form)
    inner = getattr(pipe, "pipe", pipe)
    before = dict(vars(inner)), dict(inner.config)
    fast, settings = few_steps(pipe)
    assert settings == FEW_STEPS
    assert type(fast) is type(pipe)
    steps = []
    output = edit(fast, **settings, callback_on_step_end=lambda pipe, step, timestep, kept: steps.append(step) or kept)
    assert max(steps) + 1 <= settings["num_inference_steps"] * 0.7 + 1
    assert_outside_is_kept(output)
    assert shows_the_colour(judge, output)
    assert (dict(vars(inner)), dict(inner.config)) == before


def test_models_that_predict_noise_get_a_scheduler_that_needs_few_steps():
    pipe = IEditPipeline(**tiny_models.sd_components())
    scheduler = few_steps(pipe)[0].scheduler
    assert type(scheduler) is DPMSolverMultistepScheduler
    assert scheduler.config.use_karras_sigmas
    for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "num_train_timesteps"):
        assert scheduler.config[name] == pipe.scheduler.config[name]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in GUIDED])
def test_models_of_other_kinds_stay_as_they_are(name):
    editor = LocalEditor(FAMILIES[name].pipe())
    assert few_steps(editor) == (editor, {})


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("options", [{"timestep_spacing": "trailing"}, {"rescale_betas_zero_snr": True}])
def test_models_that_are_made_for_few_steps_stay_as_they_are(options):
    for scheduler in (LCMScheduler(), EulerDiscreteScheduler(**options), UniPCMultistepScheduler(**options)):
        pipe = IEditPipeline(**tiny_models.sd_components() | {"scheduler": scheduler})
        assert few_steps(pipe) == (pipe, {})


# Guidance in the first steps alone


def without_guidance_after(pipe, steps):
    """Another way to it: from then on, the model says twice what it says of the prompt."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    calls = []

    def repeat(module, inputs, outputs):
        calls.append(len(outputs[0]))
        return (outputs[0].chunk(2)[1].repeat(2, 1, 1, 1),) if len(calls) > steps else outputs

    return denoiser.register_forward_hook(repeat)


@pytest.mark.filterwarnings("ignore:.*text prompts.*initial image:FutureWarning")
@pytest.mark.usefixtures("small_conditions")
@pytest.mark.parametrize("name", GUIDED)
def test_guidance_ends_after_its_share_of_the_steps(name):
    family = FAMILIES[name]
    editor = LocalEditor(family.pipe())
    rows = []
    denoiser = getattr(editor.pipe, "unet", None) or editor.pipe.transformer
    counter = denoiser.register_forward_hook(lambda module, inputs, outputs: rows.append(len(outputs[0])))
    source = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, WIDTH, 3), dtype=np.uint8))
    mask = Image.new("L", source.size)
    mask.paste(255, (20, 13, 71, 39))

    def run(**options):
        call = {key: value for key, value in family.call.items() if key not in ("height", "width")}
        call |= {"num_inference_steps": 6, "strength": 1.0, "guidance_scale": 50.0} | options
        generator = torch.Generator().manual_seed(0)
        output = editor(source, "a car", mask_image=mask, num_images_per_prompt=2, generator=generator, **call)
        return np.stack([np.asarray(image, dtype=int) for image in output.images])

    guided = run()
    before, rows[:] = list(rows), []
    cut = run(callback_on_step_end=GuidanceCutoffCallback(0.5))
    assert rows == [size // (1 if step < 3 else 2) for step, size in enumerate(before)]
    counter.remove()
    # Nothing of it is left.
    assert not denoiser._forward_pre_hooks
    assert np.array_equal(run(), guided)
    other_way = without_guidance_after(editor.pipe, 3)
    expected = run()
    other_way.remove()
    assert np.abs(cut - expected).max() <= 1
    assert not np.array_equal(cut, guided)


def test_guidance_ends_for_each_result_of_a_batch(mini_pipe):
    """Each of several is what it is alone."""
    options = FEW_STEPS | {"guidance_scale": 7.5, "callback_on_step_end": GuidanceCutoffCallback(0.5)}
    together = edit(mini_pipe, results=2, **options).images
    alone = [image for number in (0, 1) for image in edit(mini_pipe, (number,), results=2, **options).images]
    for first, second in zip(together, alone, strict=True):
        assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 2
    assert not np.array_equal(*map(np.asarray, together[:2]))


def test_guidance_ends_beside_an_ip_adapter():
    image_encoder, feature_extractor = tiny_models.image_encoder()
    pipe = IEditPipeline(
        **tiny_models.sd_components() | {"image_encoder": image_encoder, "feature_extractor": feature_extractor}
    )
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    image = SCENES[0].image

    def run(**options):
        options |= {"guidance_scale": 5.0, "num_inference_steps": 4, "strength": 1.0, "ip_adapter_image": image}
        return pipe(image, "a car", generator=torch.Generator().manual_seed(0), output_type="np", **options)

    images = run(callback_on_step_end=GuidanceCutoffCallback(0.5)).images
    handle = without_guidance_after(pipe, 2)
    expected = run().images
    handle.remove()
    assert np.abs(images - expected).max() < 1e-3


def test_an_edit_that_is_interrupted_leaves_the_next_one_its_guidance(mini_pipe):
    cutoff = GuidanceCutoffCallback(0.25)

    def stop(pipe, step, timestep, kept):
        kept = cutoff(pipe, step, timestep, kept)
        pipe._interrupt = step == 2
        return kept

    options = FEW_STEPS | {"guidance_scale": 7.5}
    expected = edit(mini_pipe, **options).images
    edit(mini_pipe, **options, callback_on_step_end=stop)
    after = edit(mini_pipe, **options).images
    assert all(np.array_equal(np.asarray(one), np.asarray(two)) for one, two in zip(expected, after, strict=True))


@pytest.mark.parametrize("share", [0, 1.5, -1, float("nan"), "half", True])
def test_a_share_of_the_steps_is_a_share(share):
    with pytest.raises(ValueError, match="`share` has to be a number above 0 and at most 1, but is "):
        GuidanceCutoffCallback(share)


@pytest.mark.usefixtures("small_conditions")
@pytest.mark.parametrize("name", ["flux", "sd-controlnet", "instruct-pix2pix"])
def test_models_that_guide_in_another_way_are_refused(name):
    pipe = FAMILIES[name].pipe()
    call = {key: value for key, value in FAMILIES[name].call.items() if key not in ("height", "width")}
    source = Image.new("RGB", (WIDTH, 64))
    message = f"`GuidanceCutoffCallback` cannot serve {type(pipe).__name__}: it is for pipelines that guide by a batch"
    with pytest.raises(ValueError, match=message):
        LocalEditor(pipe)(source, "a car", callback_on_step_end=GuidanceCutoffCallback(0.5), **call)


# A tiny VAE


@pytest.fixture(scope="module")
def tiny_vae():
    return AutoencoderTiny.from_pretrained(mini.tiny_vae_path())


def test_the_background_is_exact_with_a_tiny_vae_and_the_edit_succeeds(mini_pipe, mini_editor, tiny_vae, judge):
    for pipe in (mini_pipe, mini_editor):
        fast, settings = few_steps(pipe)
        inner = getattr(fast, "pipe", fast)
        inner.vae = tiny_vae
        output = edit(fast, **settings)
        assert_outside_is_kept(output)
        assert shows_the_colour(judge, output)
    assert mini_pipe.vae is not tiny_vae


def test_models_that_see_the_source_take_a_tiny_vae():
    """They encode it apart, for the background."""
    pipe = FAMILIES["instruct-pix2pix"].pipe()
    pipe.vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    source = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    mask = Image.new("L", source.size)
    mask.paste(255, (16, 16, 48, 48))
    output = LocalEditor(pipe)(source, "make it red", mask_image=mask, num_inference_steps=2)
    changed = (np.asarray(output.images[0]) != np.asarray(source)).any(axis=-1)
    assert changed.any()
    assert not changed[np.asarray(mask) == 0].any()


# The command


@pytest.fixture
def run(folder, capfd, monkeypatch):
    """Runs an edit of the picture by the command; returns its line, and what the pipelines were called with."""
    calls = []
    for cls in (IEditPipeline, LocalEditor):
        original = cls.__call__

        def call(self, *args, original=original, **given):
            calls.append((self, given))
            return original(self, *args, **given)

        # The command reads the signature.
        call.__wrapped__ = original
        monkeypatch.setattr(cls, "__call__", call)

    def run(*argv):
        calls.clear()
        code = cli.main(["edit", "in.png", "a red car", "-o", "out.png", "--mask", "mask.png", *argv])
        out, err = capfd.readouterr()
        assert code == 0, err
        return out, *calls[0]

    return run


def test_fast_is_what_nothing_else_says(run):
    line, pipe, given = run("--model", "mini", "--fast", "--seed", "1")
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert FEW_STEPS.items() <= given.items()
    assert "--fast" not in line
    _, pipe, given = run("--model", "mini", "--fast", "--steps", "5", "--guidance-scale", "2")
    assert type(pipe.scheduler) is DPMSolverMultistepScheduler
    assert (given["num_inference_steps"], given["guidance_scale"]) == (5, 2)
    _, pipe, given = run("--model", "mini-sd3", "--fast")
    assert FEW_STEPS.items() <= given.items()


def test_fast_of_a_model_that_it_does_not_concern_says_so(run, tmp_path):
    FAMILIES["flux"].pipe().save_pretrained(tmp_path / "flux")
    line, _, given = run("--model", str(tmp_path / "flux"), "--fast", "--processing-resolution", "32")
    assert "--fast changes nothing of a FluxImg2ImgPipeline" in line
    assert not FEW_STEPS.keys() & given.keys()


def test_vae_names_a_tiny_one(run):
    _, pipe, _ = run("--model", "mini", "--fast", "--vae", "mini")
    assert type(pipe.vae) is AutoencoderTiny
    _, editor, _ = run("--model", "mini-sd3", "--fast", "--vae", str(mini.tiny_vae_path()))
    assert type(editor.pipe.vae) is AutoencoderTiny


def test_a_vae_that_does_not_fit_is_an_error(folder, capfd, tmp_path):
    other = tmp_path / "other"
    tiny = AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    tiny.save_pretrained(other)
    for model, vae, message in (
        ("mini", "mni", "--vae 'mni': there is no such folder or model .*did you mean 'mini'"),
        ("mini", str(mini.model_path() / "vae"), "--vae '.*vae' gives no usable AutoencoderTiny"),
        ("mini", str(other), "`unet` has to take the 16 latent channels of `vae`, but takes 4"),
        ("mini-sd3", str(other), "--vae '.*other' makes latents of 16 channels, and the model takes 4"),
    ):
        code = cli.main(["edit", "in.png", "a red car", "-o", "out.png", "--model", model, "--vae", vae])
        out, err = capfd.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert re.search(message, err), err
        assert not (folder / "out.png").exists()


def test_threads_of_the_command_do_not_spin_unless_the_user_says_so(monkeypatch):
    for given, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
        if given is None:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        cli._import_libraries.__wrapped__()
        assert os.environ["OMP_WAIT_POLICY"] == expected
