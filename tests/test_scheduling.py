"""`IEditMaskedScheduler`: Eq. 13 at the right noise level, on every scheduler that image-to-image pipelines use."""

import copy
import inspect
import warnings

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw
from tiny_models import sd3_components, sd_components, sdxl_components

from diffusers_iedit import IEditMaskedDDIM, IEditMaskedScheduler
from diffusers_iedit.regions_iedit import read_masks
from diffusers_iedit.scheduling_iedit import SERVED


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

# Every way in which a served scheduler walks through its noise levels.
CONFIGS = [
    ("DDIMScheduler", SD | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMScheduler", SD | {"clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    ("DDIMParallelScheduler", SD | {"clip_sample": False}),
    ("DDPMScheduler", SD | {"clip_sample": False}),
    ("DDPMParallelScheduler", SD | {"clip_sample": False}),
    ("PNDMScheduler", SD | {"skip_prk_steps": True, "steps_offset": 1}),
    ("PNDMScheduler", SD | {"skip_prk_steps": False}),
    ("LCMScheduler", SD),
    ("TCDScheduler", SD),
    *[(name, SD) for name in ("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")],
    ("EulerDiscreteScheduler", SD | {"final_sigmas_type": "sigma_min"}),
    *[
        (name, SD | {option: True for option in [sigmas] if sigmas})
        for name in (
            "EulerDiscreteScheduler",
            "LMSDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "DEISMultistepScheduler",
            "UniPCMultistepScheduler",
            "SASolverScheduler",
        )
        for sigmas in (None, *SIGMAS)
    ],
    ("KDPM2AncestralDiscreteScheduler", SD | {"use_karras_sigmas": True}),
    ("DPMSolverSDEScheduler", SD | {"noise_sampler_seed": 0}),
    ("DPMSolverSDEScheduler", SD | {"noise_sampler_seed": 0, "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", SD | {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", SD | {"solver_order": 3, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", SD | {"use_lu_lambdas": True}),
    ("DPMSolverSinglestepScheduler", SD | {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", SD | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ("EDMEulerScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_karras_sigmas": True}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchLCMScheduler", {"shift": 3.0}),
]
every_scheduler = pytest.mark.parametrize(
    ("name", "config"),
    CONFIGS,
    ids=["-".join([name, *(f"{k}={v}" for k, v in config.items() if k not in SD)]) for name, config in CONFIGS],
)


def make_scheduler(name, config=SD):
    return getattr(diffusers, name)(**config)


def is_flow(scheduler):
    return "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas", False)


def img2img(scheduler, source, noise, model, strength=1.0, steps=10):
    """What every image-to-image pipeline does with its scheduler. Returns [(model input, timestep, latents after)]."""
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    first = timesteps[:1].repeat(len(source))
    if hasattr(scheduler, "scale_noise"):
        latents = scheduler.scale_noise(source, first[:1], noise)
    else:
        latents = scheduler.add_noise(source, noise, first)

    kwargs = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = torch.Generator().manual_seed(0)
    trajectory = []
    for t in timesteps:
        model_input = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(model(latents, model_input), t, latents, **kwargs, return_dict=False)[0]
        trajectory.append((model_input, t, latents))
    return trajectory


def pixelwise_model(latents, model_input):
    """A stand-in for the UNet that looks at each latent cell alone, so that no cell depends on another."""
    return 0.5 * torch.sin(3 * model_input)


@pytest.fixture
def source():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask():
    """Two hard masks, one per image of the batch; 1 = edit."""
    mask = torch.zeros(2, 1, 4, 6)
    mask[0, :, 1:3, 2:5] = 1
    mask[1, :, :, :2] = 1
    return mask


# What is kept and what is edited


@every_scheduler
@pytest.mark.parametrize(
    ("strength", "steps", "dtype"),
    [
        (0.1, 50, "bfloat16"),
        (0.5, 4, "float32"),
        (0.6, 10, "bfloat16"),
        (1.0, 4, "bfloat16"),
        (1.0, 50, "float32"),
    ],
)
def test_outside_is_the_source_and_inside_is_the_unmasked_result(
    name, config, strength, steps, dtype, source, noise, mask
):
    source, noise = (each.to(getattr(torch, dtype)) for each in (source, noise))
    scheduler = make_scheduler(name, config)
    masked = IEditMaskedScheduler.wrap(scheduler, mask)
    kept = img2img(masked, source, noise, pixelwise_model, strength, steps)[-1][2]
    plain = img2img(scheduler, source, noise, pixelwise_model, strength, steps)[-1][2]
    assert plain.isfinite().all()
    assert not torch.equal(plain, source)
    assert torch.equal(kept, torch.where(mask == 1, plain, source))


@every_scheduler
@pytest.mark.parametrize("all_ones", [torch.ones(1, 1, 4, 6), None], ids=["all-ones", "no-mask"])
def test_editing_everywhere_is_the_unmasked_scheduler(name, config, all_ones, source, noise):
    scheduler = make_scheduler(name, config)
    masked = IEditMaskedScheduler.wrap(scheduler, all_ones)
    edited = img2img(masked, source, noise, pixelwise_model, strength=0.6, steps=5)
    plain = img2img(scheduler, source, noise, pixelwise_model, strength=0.6, steps=5)
    for (_, _, after), (_, _, plain_after) in zip(edited, plain, strict=True):
        assert torch.equal(after, plain_after)


# The noise level


def source_as_the_model_expects_it(scheduler, timestep, source, noise):
    """The noisy source, scaled as a model input, that belongs to a timestep: from the training process alone."""
    timestep = float(timestep)
    if is_flow(scheduler):
        sigma = timestep / 1000
        return (1 - sigma) * source + sigma * noise
    if "EDM" in type(scheduler).__name__:
        sigma = torch.tensor(4 * timestep).exp()
        return (source + sigma * noise) / (sigma**2 + scheduler.config.sigma_data**2) ** 0.5
    alpha_bar = scheduler.alphas_cumprod
    below = int(timestep)
    above = min(below + 1, 999)
    alpha_bar = alpha_bar[below].lerp(alpha_bar[above], timestep - below)
    return alpha_bar**0.5 * source + (1 - alpha_bar) ** 0.5 * noise


@every_scheduler
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_the_model_sees_the_source_at_the_level_of_its_timestep(name, config, strength, source, noise):
    masked = IEditMaskedScheduler.wrap(make_scheduler(name, config), torch.zeros(1, 1, 4, 6))
    trajectory = img2img(masked, source, noise, pixelwise_model, strength, steps=10)
    assert len(trajectory) > 4
    # The first input is the pipeline's own. Of sigmas between timesteps, most schedulers keep the whole part of the
    # timestep only, which is felt at the small ones.
    for model_input, t, _ in trajectory[1:]:
        expected = source_as_the_model_expects_it(masked, t, source, noise)
        torch.testing.assert_close(model_input, expected, atol=0.03, rtol=0)


DETERMINISTIC = [
    (name, config)
    for name, config in CONFIGS
    if not any(word in name for word in ("DDPM", "LCM", "TCD", "Ancestral", "SDE"))
    and "sde" not in config.get("algorithm_type", "")
    and config.get("prediction_type") != "v_prediction"
    and not config.get("stochastic_sampling")
]


@pytest.mark.parametrize(("name", "config"), DETERMINISTIC, ids=lambda value: value if isinstance(value, str) else "")
def test_with_a_perfect_model_masked_and_unmasked_trajectories_agree(name, config, source, noise):
    """A model that knows the source keeps it at the scheduler's own levels: the blend must then change nothing."""
    scheduler = make_scheduler(name, config)
    tolerance = 1e-3
    if name == "SASolverScheduler":
        scheduler.tau_func = lambda t: 0  # no noise of its own
        tolerance = 0.02  # its `add_noise` starts from whole timesteps, its steps from sigmas

    def perfect_model(latents, model_input):
        if is_flow(scheduler):
            return noise - source
        if "EDM" in name:
            sigma = (latents - source).norm() / noise.norm()
            unscaled = scheduler.precondition_outputs(latents, torch.zeros(()), sigma)
            return (source - unscaled) / (scheduler.precondition_outputs(latents, torch.ones(()), sigma) - unscaled)
        return noise

    masked = IEditMaskedScheduler.wrap(scheduler, torch.zeros(1, 1, 4, 6))
    kept = img2img(masked, source, noise, perfect_model)
    plain = img2img(scheduler, source, noise, perfect_model)
    for (_, _, after), (_, _, plain_after) in list(zip(kept, plain, strict=True))[:-1]:
        torch.testing.assert_close(after, plain_after, atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("skip_prk_steps", [True, False])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_pndm_is_at_the_level_of_the_next_timestep_though_timesteps_repeat(skip_prk_steps, start, source, noise):
    masked = IEditMaskedScheduler.wrap(PNDMScheduler(**SD, skip_prk_steps=skip_prk_steps), torch.zeros(1, 1, 4, 6))
    trajectory = img2img(masked, source, noise, pixelwise_model, strength=1 - start / 10 + 1e-6, steps=10)
    levels = [t for _, t, _ in trajectory[1:]]
    assert len(set(levels)) < len(levels) + 1
    for (_, _, after), t in zip(trajectory[:-1], levels, strict=True):
        assert torch.equal(after, masked.add_noise(source, noise, t.reshape(1)))


def test_pndm_without_a_begin_index_takes_a_repeated_timestep_for_its_second(source, noise):
    masked = IEditMaskedScheduler.wrap(PNDMScheduler(**SD, skip_prk_steps=True), torch.zeros(1, 1, 4, 6))
    masked.set_timesteps(10)
    assert masked.timesteps[1] == masked.timesteps[2]
    masked.add_noise(source, noise, masked.timesteps[2:3])
    latents = masked.step(noise, masked.timesteps[2], source).prev_sample
    assert torch.equal(latents, masked.add_noise(source, noise, masked.timesteps[3:4]))


def test_steps_may_be_taken_from_anywhere_in_the_schedule_of_a_scheduler_that_keeps_no_count(source, noise):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), torch.zeros(1, 1, 4, 6))
    masked.set_timesteps(10)
    latents = masked.add_noise(source, noise, masked.timesteps[:1])
    for index in (0, 1, 2, 1, 2, 7, 9, 0):
        latents = masked.step(noise, masked.timesteps[index], latents).prev_sample
        arrived = masked.timesteps[index + 1 : index + 2]
        assert torch.equal(latents, masked.add_noise(source, noise, arrived) if index < 9 else source)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "SASolverScheduler"]
)
def test_the_level_is_right_without_a_begin_index(name, source, noise):
    """As for pipelines that do not call `set_begin_index`, where Karras sigmas repeat timesteps once rounded."""
    scheduler = make_scheduler(name, SD | {"use_karras_sigmas": True})
    masked = IEditMaskedScheduler.wrap(scheduler, torch.zeros(1, 1, 4, 6))
    masked.set_timesteps(40)
    latents = masked.add_noise(source, noise, masked.timesteps[:1])
    for index, t in enumerate(masked.timesteps):
        latents = masked.step(pixelwise_model(latents, latents), t, latents).prev_sample
        sigma = masked.sigmas[index + 1]
        if index == len(masked.timesteps) - 1:
            sigma = 0
        scale = (1 + sigma**2) ** 0.5 if name.startswith(("DPM", "SA")) else 1
        torch.testing.assert_close(latents, (source + sigma * noise) / scale)


def test_a_pipeline_that_stops_early_leaves_the_source_noisy(source, noise):
    masked = IEditMaskedScheduler.wrap(EulerDiscreteScheduler(**SD), torch.zeros(1, 1, 4, 6))
    masked.set_timesteps(10)
    latents = masked.add_noise(source, noise, masked.timesteps[:1])
    for t in masked.timesteps[:8]:
        latents = masked.step(noise, t, latents).prev_sample
    assert torch.equal(latents, source + masked.sigmas[8] * noise)


# The mask


def test_soft_values_blend_linearly(source, noise):
    soft = torch.linspace(0, 1, 24).reshape(1, 1, 4, 6)
    scheduler = DDIMScheduler(**SD)
    kept = img2img(IEditMaskedScheduler.wrap(scheduler, soft), source, noise, pixelwise_model, steps=1)[-1][2]
    plain = img2img(scheduler, source, noise, pixelwise_model, steps=1)[-1][2]
    torch.testing.assert_close(kept, (1 - soft) * source + soft * plain)
    assert torch.equal(kept[..., 0, 0], source[..., 0, 0])
    assert torch.equal(kept[..., -1, -1], plain[..., -1, -1])


def test_soft_values_blend_at_every_step(source, noise):
    """With a model that predicts nothing, DDIM only rescales: Eq. 13 can be followed by hand."""
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD, clip_sample=False), torch.full((1, 1, 4, 6), 0.25))
    trajectory = img2img(masked, source, noise, lambda latents, _: torch.zeros_like(latents), steps=3)
    alpha_bar = [*(masked.alphas_cumprod[t] for t in masked.timesteps), torch.tensor(1.0)]
    expected = alpha_bar[0] ** 0.5 * source + (1 - alpha_bar[0]) ** 0.5 * noise
    for (_, _, after), now, then in zip(trajectory, alpha_bar, alpha_bar[1:], strict=False):
        expected = 0.25 * (then / now) ** 0.5 * expected
        expected += 0.75 * (then**0.5 * source + (1 - then) ** 0.5 * noise)
        torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("edge", [1.0, 0.5], ids=["hard", "soft"])
def test_nan_and_inf_do_not_cross_the_border(bad, edge, dtype, source, noise, mask):
    mask[0, :, 1, 2] = edge
    source, noise = source.to(dtype), noise.to(dtype)

    def broken_model(latents, model_input):
        return torch.where(mask == 0, bad, pixelwise_model(latents, model_input)).to(dtype)

    kept = img2img(IEditMaskedScheduler.wrap(EulerDiscreteScheduler(**SD), mask), source, noise, broken_model)
    assert all(after.isfinite().all() for _, _, after in kept)
    assert all(after.dtype == dtype for _, _, after in kept)


@pytest.mark.parametrize("size", [(32, 48), (31, 50), (5, 7), (2, 3)])
def test_a_mask_of_another_size_edits_every_latent_cell_it_touches(size, source, noise):
    mask = torch.zeros(1, 1, *size)
    mask[..., size[0] // 2, size[1] // 3] = 1
    kept = img2img(IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask), source, noise, pixelwise_model)[-1][2]
    edited = (kept != source).any(dim=(0, 1))

    def span(cell, cells, pixels):  # the pixels, or parts of one, that lie under a latent cell
        return cell * pixels // cells, -(-(cell + 1) * pixels // cells)

    for row in range(4):
        for column in range(6):
            top, bottom = span(row, 4, size[0])
            left, right = span(column, 6, size[1])
            assert edited[row, column] == mask[0, 0, top:bottom, left:right].any()


def test_a_mask_of_one_serves_the_whole_batch(source, noise, mask):
    one = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask[:1])
    each = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask[:1].repeat(2, 1, 1, 1))
    results = [img2img(s, source, noise, pixelwise_model)[-1][2] for s in (one, each)]
    assert torch.equal(*results)


def test_half_precision_masks_are_taken(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask.to(torch.bfloat16))
    kept = img2img(masked, source, noise, pixelwise_model)[-1][2]
    assert torch.equal(kept, torch.where(mask == 1, kept, source))


def test_the_mask_can_be_changed_and_taken_off(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask)
    kept = img2img(masked, source, noise, pixelwise_model)[-1][2]
    assert torch.equal(kept, torch.where(mask == 1, kept, source))
    masked.set_mask(1 - mask)
    assert torch.equal(masked.mask, 1 - mask)
    kept = img2img(masked, source, noise, pixelwise_model)[-1][2]
    assert torch.equal(kept, torch.where(mask == 0, kept, source))
    masked.set_mask(None)
    plain = img2img(DDIMScheduler(**SD), source, noise, pixelwise_model)[-1][2]
    assert torch.equal(img2img(masked, source, noise, pixelwise_model)[-1][2], plain)


def test_each_run_has_its_own_source(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(EulerDiscreteScheduler(**SD), mask)
    for run_source in (source, source.flip(0), torch.zeros(2, 4, 8, 12)):
        run_noise = torch.randn_like(run_source)
        outside = F.adaptive_max_pool2d(mask, run_source.shape[-2:]) == 0
        kept = img2img(masked, run_source, run_noise, pixelwise_model)[-1][2]
        assert torch.equal(torch.where(outside, kept, 0), torch.where(outside, run_source, 0))


def test_only_the_first_noising_of_a_run_is_the_source(source, noise, mask):
    """Inpainting pipelines noise their source again after every step."""
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask)

    def noising_model(latents, model_input):
        masked.add_noise(latents, latents, masked.timesteps[:1])
        return pixelwise_model(latents, model_input)

    kept = img2img(masked, source, noise, noising_model)[-1][2]
    assert torch.equal(kept, torch.where(mask == 1, kept, source))


def test_each_image_may_have_its_own_first_timestep(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask)
    masked.set_timesteps(10)
    latents = masked.add_noise(source, noise, timesteps=masked.timesteps[[2, 4]])
    for t in masked.timesteps[4:]:
        latents = masked.step(model_output=noise, timestep=t, sample=latents).prev_sample
    assert torch.equal(latents, torch.where(mask == 1, latents, source))


# What it is made of


@pytest.mark.parametrize("name", sorted({name for name, _ in CONFIGS}))
def test_wrap_returns_a_copy_with_the_scheduler_s_own_interface(name, mask):
    scheduler = make_scheduler(name, {})
    before = repr(scheduler.__dict__)
    masked = IEditMaskedScheduler.wrap(scheduler, mask)
    assert isinstance(masked, IEditMaskedScheduler)
    assert isinstance(masked, type(scheduler))
    assert not isinstance(scheduler, IEditMaskedScheduler)
    masked.set_timesteps(10)
    assert repr(scheduler.__dict__) == before
    for method in ("set_timesteps", "step", "add_noise", "scale_noise", "set_begin_index", "__init__"):
        if hasattr(scheduler, method):
            ours, theirs = (inspect.signature(getattr(each, method)) for each in (masked, scheduler))
            assert ours.parameters == theirs.parameters


def test_a_wrapped_copy_shares_no_history_with_the_scheduler(source, noise):
    scheduler = DPMSolverMultistepScheduler(**SD)
    scheduler.set_timesteps(4)
    scheduler.step(noise, scheduler.timesteps[0], source)
    history = list(scheduler.model_outputs)
    masked = IEditMaskedScheduler.wrap(scheduler, None)
    masked.step(noise, masked.timesteps[1], source)
    assert all(now is before for now, before in zip(scheduler.model_outputs, history, strict=True))


def test_every_served_scheduler_is_in_these_tests():
    assert {name for name, _ in CONFIGS} == {served.__name__ for served in SERVED}


def drawn_mask(mode="L"):
    """A gradient, hard and soft, that differs from its transposes."""
    drawn = Image.linear_gradient("L").resize((48, 32))
    ImageDraw.Draw(drawn).rectangle((0, 0, 9, 15), fill=255)
    if mode == "I;16":
        return Image.fromarray(np.asarray(drawn).astype(np.uint16) * 257)
    return drawn.convert(mode)


def turned_mask():
    turned = drawn_mask().transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    return turned


@pytest.mark.parametrize(
    "form",
    [
        *[drawn_mask(mode) for mode in ("L", "RGB", "1", "I;16")],
        turned_mask(),
        np.asarray(drawn_mask()),
        np.asarray(drawn_mask())[None, ..., None],
        np.asarray(drawn_mask()) > 99,
        np.asarray(drawn_mask()) / 255,
        [drawn_mask()],
        [np.asarray(drawn_mask())],
    ],
    ids=["L", "RGB", "1", "16 bit", "turned", "uint8", "NHWC", "bool", "float64", "list of PIL", "list of numpy"],
)
def test_masks_are_taken_in_the_forms_that_the_pipeline_takes(form):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(), form)
    expected = read_masks(form, 1, (32, 48))
    torch.testing.assert_close(masked.mask, expected, rtol=0, atol=1e-6)
    assert masked.mask.is_floating_point()


def test_a_list_of_masks_is_one_a_picture(source, noise):
    images = [drawn_mask(), Image.new("L", (48, 32), 255)]
    assert IEditMaskedScheduler.wrap(DDIMScheduler(), images).mask.shape == (2, 1, 32, 48)


def test_wrapping_again_replaces_the_mask(mask):
    first = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask)
    second = IEditMaskedScheduler.wrap(first, 1 - mask)
    assert type(second) is type(first)
    assert torch.equal(second.mask, 1 - mask)
    assert torch.equal(first.mask, mask)


def test_step_returns_all_that_the_scheduler_s_own_returns(source, noise, mask):
    scheduler = DDIMScheduler(**SD)
    masked = IEditMaskedScheduler.wrap(scheduler, mask)
    for each in (scheduler, masked):
        each.set_timesteps(10)
    t = scheduler.timesteps[4]
    latents = masked.add_noise(source, noise, t.reshape(1))
    ours, theirs = masked.step(noise, t, latents), scheduler.step(noise, t, latents)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.pred_original_sample, theirs.pred_original_sample)
    assert torch.equal(ours["prev_sample"], ours.prev_sample)
    as_tuple = masked.step(noise, t, latents, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], ours.prev_sample)
    assert torch.equal(as_tuple[1], ours.pred_original_sample)


@pytest.mark.parametrize("edge", [1.0, 0.5], ids=["hard", "soft"])
def test_what_lcm_denoises_is_masked_too(edge, source, noise, mask):
    """The pipeline of latent consistency models returns it in the place of the latents."""
    mask *= edge
    scheduler = LCMScheduler(**SD)
    masked = IEditMaskedScheduler.wrap(scheduler, mask)
    for each in (scheduler, masked):
        each.set_timesteps(4)
    latents = masked.add_noise(source, noise, masked.timesteps[:1])
    for t in masked.timesteps:
        as_tuple = copy.deepcopy(masked).step(noise, t, latents, return_dict=False)
        ours, theirs = (each.step(noise, t, latents) for each in (masked, scheduler))
        torch.testing.assert_close(ours.denoised, (1 - mask) * source + mask * theirs.denoised)
        assert torch.equal(torch.where(mask == 0, ours.denoised, 0), torch.where(mask == 0, source, 0))
        assert torch.equal(as_tuple[1], ours.denoised)
        latents = ours.prev_sample
    assert torch.equal(ours.denoised, latents)


def test_a_deep_copy_goes_on_where_the_run_was(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(EulerDiscreteScheduler(**SD), mask)
    masked.set_timesteps(4)
    latents = masked.add_noise(source, noise, masked.timesteps[:1])
    for t in masked.timesteps:
        masked = copy.deepcopy(masked)
        latents = masked.step(noise, t, latents).prev_sample
    assert torch.equal(latents, torch.where(mask == 1, latents, source))


def public(config):
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize("masked_class", [IEditMaskedDDIM, type(IEditMaskedScheduler.wrap(DDIMScheduler(), None))])
def test_configurations_go_both_ways(masked_class, tmp_path, mask):
    config = {"trained_betas": torch.linspace(0.001, 0.02, 1000).tolist(), "steps_offset": 1, "clip_sample": False}
    stock = DDIMScheduler(**config)
    masked = masked_class.from_config(stock.config)
    masked.set_mask(mask)
    masked.save_pretrained(tmp_path)
    for other in (
        masked,
        DDIMScheduler.from_config(masked.config),
        masked_class.from_pretrained(tmp_path),
        DDIMScheduler.from_pretrained(tmp_path),
    ):
        assert torch.equal(other.alphas_cumprod, stock.alphas_cumprod)
        assert public(other.config) == public(stock.config)
    assert masked_class.from_pretrained(tmp_path).mask is None
    assert {path.name for path in tmp_path.iterdir()} == {"scheduler_config.json"}
    assert EulerDiscreteScheduler.from_config(masked.config).config.trained_betas == config["trained_betas"]


def test_the_mixin_form_is_the_base_class_until_it_has_a_mask(source, noise, mask):
    masked, stock = IEditMaskedDDIM(**SD), DDIMScheduler(**SD)
    plain = img2img(stock, source, noise, pixelwise_model)[-1][2]
    assert torch.equal(img2img(masked, source, noise, pixelwise_model)[-1][2], plain)
    masked.set_mask(mask)
    assert torch.equal(img2img(masked, source, noise, pixelwise_model)[-1][2], torch.where(mask == 1, plain, source))


def test_a_subclass_of_a_masked_scheduler_blends_once(source, noise):
    class Mine(IEditMaskedDDIM):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs)

    soft = torch.full((1, 1, 4, 6), 0.5)
    mine, plain = Mine(**SD), IEditMaskedDDIM(**SD)
    results = []
    for scheduler in (mine, plain):
        scheduler.set_mask(soft)
        results.append(img2img(scheduler, source, noise, pixelwise_model)[-1][2])
    assert torch.equal(*results)


def test_a_subclass_of_a_served_scheduler_is_served(source, noise, mask):
    class Mine(DDIMScheduler):
        pass

    masked = IEditMaskedScheduler.wrap(Mine(**SD), mask)
    assert type(masked).__name__ == "Mine"
    assert torch.equal(
        img2img(masked, source, noise, pixelwise_model)[-1][2],
        img2img(IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask), source, noise, pixelwise_model)[-1][2],
    )


# Bad input


REFUSED = sorted(
    name
    for name in vars(diffusers.schedulers)
    if name.endswith("Scheduler") and name not in {served.__name__ for served in SERVED}
)


@pytest.mark.parametrize("name", REFUSED)
def test_schedulers_whose_levels_are_unknown_are_refused_by_name(name):
    scheduler = object.__new__(getattr(diffusers.schedulers, name))
    with pytest.raises(TypeError, match=rf"cannot mask {name}.*Use one of .*DDIMScheduler"):
        IEditMaskedScheduler.wrap(scheduler, None)


def test_a_scheduler_of_one_s_own_is_refused_by_name():
    class MyScheduler(SchedulerMixin):
        pass

    with pytest.raises(TypeError, match="cannot mask MyScheduler"):
        IEditMaskedScheduler.wrap(MyScheduler(), torch.ones(1, 1, 4, 4))
    with pytest.raises(TypeError, match="cannot mask MyMasked"):
        type("MyMasked", (IEditMaskedScheduler, MyScheduler), {})


@pytest.mark.parametrize(
    ("bad_mask", "error", "message"),
    [
        ([[1.0]], TypeError, "`mask` must be a floating point tensor, .* but is list"),
        ([], TypeError, "`mask` must be a floating point tensor, .* but is list"),
        ("mask.png", TypeError, "`mask` must be a floating point tensor, .* but is str"),
        (np.ones((4, 4), dtype=np.int64), TypeError, "`mask` has to be of dtype uint8, bool or .* torch.int64"),
        (np.ones((4, 4), dtype=np.uint8), ValueError, "`mask` is uint8 with values 0 and 1"),
        (np.ones((1, 4, 4, 3)), ValueError, r"`mask` has to have shape .* \(1, 4, 4, 3\)"),
        (np.ones((0, 4), dtype=np.uint8), ValueError, r"`mask` has no pixels: its shape is \(0, 4\)"),
        ([Image.new("L", (4, 4)), Image.new("L", (4, 6))], ValueError, "`mask` must hold .* 4x4, 4x6 pixels"),
        (torch.ones(1, 1, 4, 4, dtype=torch.bool), TypeError, "`mask` must be a floating point .* of torch.bool"),
        (torch.ones(1, 1, 4, 4, dtype=torch.uint8), TypeError, "`mask` must be a floating point .* of torch.uint8"),
        (torch.ones(4, 4), ValueError, r"`mask` must have shape \(batch_size or 1, 1,.* has shape \(4, 4\)"),
        (torch.ones(1, 3, 4, 4), ValueError, r"`mask` must have shape .* \(1, 3, 4, 4\)"),
        (torch.ones(1, 1, 0, 4), ValueError, r"`mask` must have shape .* \(1, 1, 0, 4\)"),
        (torch.full((1, 1, 4, 4), 255.0), ValueError, r"`mask` must have values in \[0, 1\].* 255.0 to 255.0"),
        (torch.full((1, 1, 4, 4), -0.1), ValueError, r"`mask` must have values in \[0, 1\]"),
        (torch.full((1, 1, 4, 4), float("nan")), ValueError, r"`mask` must have values in \[0, 1\].* nan to nan"),
        (torch.full((1, 1, 4, 4), float("inf")), ValueError, r"`mask` must have values in \[0, 1\].* inf to inf"),
    ],
    ids=[
        "list",
        "no masks",
        "path",
        "int64",
        "0 and 1",
        "colours",
        "no pixels",
        "sizes",
        "bool",
        "uint8",
        "2d",
        "rgb",
        "empty",
        "255",
        "negative",
        "nan",
        "inf",
    ],
)
def test_bad_masks_are_refused(bad_mask, error, message):
    with pytest.raises(error, match=message):
        IEditMaskedScheduler.wrap(DDIMScheduler(), bad_mask)


def test_one_nan_among_good_values_is_refused(mask):
    mask[1, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="`mask` must have values"):
        IEditMaskedScheduler.wrap(DDIMScheduler(), mask)


def test_a_mask_of_another_batch_size_is_refused(source, noise):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), torch.ones(3, 1, 4, 6))
    with pytest.raises(ValueError, match="`mask` must have batch size 1 or that of the latents, 2, but has 3"):
        img2img(masked, source, noise, pixelwise_model)


@pytest.mark.parametrize("shape", [(1, 64), (1, 4, 3, 8, 8)], ids=["flat", "video"])
def test_latents_that_are_neither_maps_nor_tokens_are_refused(shape):
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), torch.ones(1, 1, 8, 8))
    with pytest.raises(ValueError, match=rf"`mask` needs latents of shape .* \({', '.join(map(str, shape))}\)"):
        img2img(masked, torch.zeros(shape), torch.zeros(shape), pixelwise_model)


def test_latents_of_another_shape_than_the_source_are_refused(source, noise):
    scheduler = FlowMatchLCMScheduler(scale_factors=[1.0, 2.0], upscale_mode="nearest")
    masked = IEditMaskedScheduler.wrap(scheduler, torch.ones(1, 1, 4, 6))
    with pytest.raises(ValueError, match=r"source's shape \(2, 4, 4, 6\), but they have shape \(2, 4, 8, 12\)"):
        img2img(masked, source, noise, pixelwise_model, steps=3)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
def test_a_masked_step_without_a_source_says_what_to_do(name, source, noise, mask):
    masked = IEditMaskedScheduler.wrap(make_scheduler(name), mask)
    masked.set_timesteps(4)
    with pytest.raises(RuntimeError, match=r"A `mask` is set, .* `add_noise` .* after `set_timesteps`"):
        masked.step(noise, masked.timesteps[0], source)


def test_the_source_of_an_earlier_run_is_not_used(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask)
    img2img(masked, source, noise, pixelwise_model)
    masked.set_timesteps(4)
    with pytest.raises(RuntimeError, match="no source latents"):
        masked.step(noise, masked.timesteps[0], source)


def test_a_timestep_off_the_schedule_is_refused(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask)
    masked.set_timesteps(10)
    masked.add_noise(source, noise, masked.timesteps[:1])
    with pytest.raises(ValueError, match=r"`timestep` must be one of `timesteps` .* but is 555"):
        masked.step(noise, 555, source)


def test_inverted_sigmas_are_refused():
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ValueError, match=r"`mask` cannot be set on FlowMatchEuler.* with `invert_sigmas=True`"):
        IEditMaskedScheduler.wrap(scheduler, torch.ones(1, 1, 4, 4))


# Stock pipelines


def run(pipe, seed=0, **kwargs):
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    settings = {"strength": 0.7, "num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent"} | kwargs
    return pipe("a red car", image=image, generator=torch.manual_seed(seed), **settings).images


def clean_source_latents(pipe, seed=0):
    """z_1 as the pipelines encode it: the first thing they draw from their generator."""
    image = 2 * torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)) - 1
    with torch.no_grad():
        latents = pipe.vae.encode(image).latent_dist.sample(torch.manual_seed(seed))
    return (latents - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor


PIPELINES = [
    (StableDiffusionImg2ImgPipeline, sd_components, None),
    (StableDiffusionImg2ImgPipeline, sd_components, "HeunDiscreteScheduler"),
    (StableDiffusionImg2ImgPipeline, sd_components, "LCMScheduler"),
    (StableDiffusionXLImg2ImgPipeline, sdxl_components, None),
    (StableDiffusionXLImg2ImgPipeline, sdxl_components, "KDPM2AncestralDiscreteScheduler"),
    (StableDiffusion3Img2ImgPipeline, sd3_components, None),
    (StableDiffusion3Img2ImgPipeline, sd3_components, "FlowMatchHeunDiscreteScheduler"),
]


@pytest.mark.parametrize(("pipeline_class", "components", "scheduler"), PIPELINES)
def test_stock_img2img_pipelines_become_local(pipeline_class, components, scheduler):
    pipe = pipeline_class(**components())
    if scheduler is not None:
        config = {} if "FlowMatch" in scheduler else pipe.scheduler.config
        pipe.scheduler = getattr(diffusers, scheduler).from_config(config)
    stock, plain = pipe.scheduler, run(pipe)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 8:40] = 1

    pipe.scheduler = IEditMaskedScheduler.wrap(stock, torch.ones(1, 1, 64, 64))
    assert torch.equal(run(pipe), plain)

    pipe.scheduler = IEditMaskedScheduler.wrap(stock, mask)
    source = clean_source_latents(pipe)
    for strength in (0.2, 0.7, 1.0):
        latents = run(pipe, strength=strength)
        inside = F.adaptive_max_pool2d(mask, latents.shape[-2:]) == 1
        assert torch.equal(torch.where(inside, 0, latents), torch.where(inside, 0, source))
        assert (latents != source).any(dim=1, keepdim=True)[inside].all()


def test_several_images_per_prompt_share_one_mask():
    pipe = StableDiffusionImg2ImgPipeline(**sd_components())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, mask)
    source = clean_source_latents(pipe)
    latents = run(pipe, num_images_per_prompt=3)
    assert latents.shape[0] == 3
    assert torch.equal(latents[..., 4:], source[..., 4:].expand(3, -1, -1, -1))
    assert not torch.equal(latents[0], latents[1])


@pytest.mark.parametrize(
    "scheduler_class",
    [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, PNDMScheduler],
)
@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_the_four_channel_inpainting_pipeline_computes_the_same(scheduler_class, strength):
    components = sd_components()
    scheduler = scheduler_class.from_config(components.pop("scheduler").config, skip_prk_steps=True)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:48, 8:40] = 1
    settings = {"strength": strength, "num_inference_steps": 10}
    inpaint = StableDiffusionInpaintPipeline(**components, scheduler=scheduler)
    theirs = run(inpaint, mask_image=mask, **settings)
    masked = IEditMaskedScheduler.wrap(scheduler, mask)
    ours = run(StableDiffusionImg2ImgPipeline(**components, scheduler=masked), **settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("pipeline_class", "components"),
    [
        (StableDiffusionImg2ImgPipeline, sd_components),
        (StableDiffusionXLImg2ImgPipeline, sdxl_components),
        (StableDiffusion3Img2ImgPipeline, sd3_components),
    ],
)
def test_a_pipeline_that_holds_a_masked_scheduler_is_saved_as_the_stock_one(pipeline_class, components, tmp_path):
    pipe = pipeline_class(**components())
    stock = pipe.scheduler
    pipe.register_modules(scheduler=IEditMaskedScheduler.wrap(stock, torch.zeros(1, 1, 8, 8)))
    pipe.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        extras = {"text_encoder_3": None, "tokenizer_3": None} if "3" in pipeline_class.__name__ else {}
        loaded = DiffusionPipeline.from_pretrained(tmp_path, **extras)
    assert type(loaded) is pipeline_class
    assert type(loaded.scheduler) is type(stock)
    assert public(loaded.scheduler.config) == public(stock.config)
    for path in tmp_path.rglob("*.json"):
        assert "IEdit" not in path.read_text()
        assert "diffusers_iedit" not in path.read_text()
