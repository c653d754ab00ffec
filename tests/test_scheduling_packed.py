"""`IEditMaskedScheduler` on latents that are packed into tokens, and with a source that is given."""

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
)
from test_scheduling import SD, every_scheduler, img2img, make_scheduler, pixelwise_model

from diffusers_iedit import IEditMaskedScheduler


def pack_2x2(latents):
    """As Flux packs: diffusers' own function."""
    return FluxImg2ImgPipeline._pack_latents(latents, *latents.shape)


def pack_1x1(latents):
    """As Flux.2 packs: diffusers' own function."""
    return Flux2Pipeline._pack_latents(latents)


def pack_frame(latents):
    """As Qwen-Image packs, whose latents have a frame axis: diffusers' own function."""
    batch_size, _, channels, height, width = latents.shape
    return QwenImageImg2ImgPipeline._pack_latents(latents, batch_size, channels, height, width)


packings = pytest.mark.parametrize("pack", [pack_2x2, pack_1x1])


@pytest.fixture
def source():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise():
    return torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def mask():
    """Two hard masks that divide tokens of 2 x 2 cells; 1 = edit."""
    mask = torch.zeros(2, 1, 4, 6)
    mask[0, :, 1:3, 2:5] = 1
    mask[1, :, :, :3] = 1
    return mask


def packed_img2img(scheduler, source, noise, pack, strength=1.0, steps=5, pack_first=False):
    """What pipelines do that pack latents into tokens: noise them, then pack. Returns the latents after each step."""
    scheduler.set_timesteps(steps)
    start = max(steps - min(int(steps * strength), steps), 0) * scheduler.order
    timesteps = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if pack_first:
        source, noise, pack = pack(source), pack(noise), lambda latents: latents
    add_noise = getattr(scheduler, "scale_noise", None)
    if add_noise is not None:
        latents = pack(add_noise(source, timesteps[:1].repeat(len(source)), noise))
    else:
        latents = pack(scheduler.add_noise(source, noise, timesteps[:1].repeat(len(source))))
    return denoise(scheduler, latents, timesteps)


def edit(scheduler, noise, steps=5, **kwargs):
    """What editing pipelines do: start from noise, whatever the schedule. Returns the latents after each step."""
    scheduler.set_timesteps(steps if not kwargs else None, **kwargs)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return denoise(scheduler, noise * getattr(scheduler, "init_noise_sigma", 1.0), scheduler.timesteps)


def denoise(scheduler, latents, timesteps):
    kwargs = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = torch.Generator().manual_seed(0)
    trajectory = []
    for t in timesteps:
        model_input = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(pixelwise_model(latents, model_input), t, latents, **kwargs, return_dict=False)[0]
        trajectory.append(latents)
    return trajectory


# Tokens


@every_scheduler
def test_of_tokens_the_outside_is_the_source_and_the_inside_is_the_unmasked_result(name, config, source, noise, mask):
    scheduler = make_scheduler(name, config)
    plain = packed_img2img(scheduler, source, noise, pack_2x2, strength=0.6)[-1]
    kept = packed_img2img(IEditMaskedScheduler.wrap(scheduler, mask), source, noise, pack_2x2, strength=0.6)[-1]
    assert torch.equal(kept, torch.where(pack_2x2(mask.expand(-1, 4, -1, -1)) == 1, plain, pack_2x2(source)))


@packings
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchHeunDiscreteScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_blended_as_the_maps_that_they_are_packed_from(name, pack, dtype, source, noise):
    """Each value by the mask of its own cell, soft values too, at every step."""
    soft = torch.linspace(0, 1, 48).reshape(2, 1, 4, 6)
    source, noise = source.to(dtype), noise.to(dtype)
    masked = IEditMaskedScheduler.wrap(make_scheduler(name, SD if "Flow" not in name else {"shift": 3.0}), soft)
    tokens = packed_img2img(masked, source, noise, pack)
    maps = img2img(masked, source, noise, pixelwise_model, steps=5)
    for after, (_, _, map_after) in zip(tokens, maps, strict=True):
        assert torch.equal(after, pack(map_after))


def test_a_frame_axis_of_one_is_taken_off(source, noise, mask):
    """Qwen-Image noises latents of shape (batch_size, 1, channels, height, width)."""
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask)
    framed = packed_img2img(masked, source[:, None], noise[:, None], pack_frame)
    assert torch.equal(framed[-1], packed_img2img(masked, source, noise, pack_2x2)[-1])


@packings
@pytest.mark.parametrize("size", [(32, 48), (5, 7), (2, 3)])
def test_for_tokens_too_the_mask_edits_every_latent_cell_it_touches(size, pack, source, noise):
    mask = torch.zeros(1, 1, *size)
    mask[..., size[0] // 2, size[1] // 3] = 1
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask)
    tokens = packed_img2img(masked, source, noise, pack)[-1]
    assert torch.equal(tokens, pack(img2img(masked, source, noise, pixelwise_model, steps=5)[-1][2]))
    assert 0 < (tokens != pack(source)).sum() < tokens.numel() / 2


@packings
def test_tokens_that_are_packed_before_they_are_noised_need_a_mask_of_the_latents_size(pack, source, noise, mask):
    """As in Modular Diffusers' Flux and Qwen-Image: no height and width reach the scheduler but the mask's."""
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask)
    late, early = (packed_img2img(masked, source, noise, pack, pack_first=first)[-1] for first in (False, True))
    assert torch.equal(early, late)
    masked.set_mask(torch.ones(1, 1, 32, 48))
    with pytest.raises(ValueError, match=r"`mask` must have the height and width of the latents .* \(1, 1, 32, 48\)"):
        packed_img2img(masked, source, noise, pack, pack_first=True)


def test_each_run_may_pack_its_own_way(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask)
    for pack in (pack_2x2, pack_1x1, lambda latents: latents, pack_2x2):
        kept = packed_img2img(masked, source, noise, pack)[-1]
        outside = pack(mask.expand(-1, 4, -1, -1)) == 0
        assert torch.equal(kept[outside], pack(source)[outside])


# A source that is given


@every_scheduler
def test_a_pipeline_that_starts_from_noise_keeps_the_given_source(name, config, source, noise, mask):
    scheduler = make_scheduler(name, config)
    plain = edit(scheduler, noise)[-1]
    kept = edit(IEditMaskedScheduler.wrap(scheduler, mask, source_latents=source), noise)[-1]
    assert torch.equal(kept, torch.where(mask == 1, plain, source))


@every_scheduler
def test_the_first_sample_is_the_noise_of_the_given_source(name, config, source, noise):
    """Outside, the run is that of an image-to-image pipeline with the same source and noise, at full strength."""
    zeros = torch.zeros(1, 1, 4, 6)
    given = edit(IEditMaskedScheduler.wrap(make_scheduler(name, config), zeros, source_latents=source), noise)
    captured = img2img(
        IEditMaskedScheduler.wrap(make_scheduler(name, config), zeros), source, noise, pixelwise_model, steps=5
    )
    for after, (_, _, captured_after) in zip(given, captured, strict=True):
        torch.testing.assert_close(after, captured_after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_the_first_sample_is_noise_also_where_the_schedule_begins_below_one(name, source, noise):
    """Editing pipelines start from noise at any `sigmas`: no part of it is a source to be taken off."""
    masked = IEditMaskedScheduler.wrap(make_scheduler(name, {}), torch.zeros(1, 1, 4, 6), source_latents=source)
    if name.startswith("FlowMatchEuler"):
        first = edit(masked, noise, sigmas=[0.8, 0.4])[0]
    else:
        first = edit(masked, noise, steps=3)[0]
    sigma = masked.sigmas[1]
    torch.testing.assert_close(first, (1 - sigma) * source + sigma * noise)


@packings
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("framed", [None, 1, 2])
def test_a_given_source_is_packed_as_the_latents_are(pack, batch_size, framed, source, noise, mask):
    given = source[:batch_size]
    source = given.expand_as(noise)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = edit(scheduler, pack(noise))[-1]
    given = given if framed is None else given.unsqueeze(framed)
    kept = edit(IEditMaskedScheduler.wrap(scheduler, mask, source_latents=given), pack(noise))[-1]
    assert torch.equal(kept, torch.where(pack(mask.expand(-1, 4, -1, -1)) == 1, plain, pack(source)))
    assert kept.is_contiguous()


def test_a_given_source_serves_every_run(source, noise, mask):
    masked = IEditMaskedScheduler.wrap(EulerDiscreteScheduler(**SD), mask, source_latents=source)
    for run_noise in (noise, noise.flip(0), noise):
        kept = edit(masked, run_noise)[-1]
        assert torch.equal(torch.where(mask == 1, 0, kept), torch.where(mask == 1, 0, source))


def test_a_given_source_takes_the_precision_of_the_latents(source, noise, mask):
    noise = noise.to(torch.bfloat16)
    kept = edit(IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask, source_latents=source), noise)[-1]
    assert kept.dtype == torch.bfloat16
    assert torch.equal(kept, torch.where(mask == 1, kept, source.to(torch.bfloat16)))


def test_wrapping_again_replaces_the_given_source(source, noise, mask):
    first = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask, source_latents=source)
    second = IEditMaskedScheduler.wrap(first, mask, source_latents=noise)
    for masked, expected in ((second, noise), (first, source)):
        kept = edit(masked, noise)[-1]
        assert torch.equal(kept, torch.where(mask == 1, kept, expected))
    with pytest.raises(RuntimeError, match="no source latents"):
        edit(IEditMaskedScheduler.wrap(second, mask), noise)


def test_a_source_with_a_gradient_is_taken(source, noise, mask):
    """As latents are that were encoded without `torch.no_grad()`."""
    masked = IEditMaskedScheduler.wrap(DDIMScheduler(**SD), mask, source_latents=source.requires_grad_() * 1)
    assert not edit(IEditMaskedScheduler.wrap(masked, mask, source_latents=source), noise)[-1].requires_grad


# Bad input


def test_tokens_that_the_source_cannot_be_packed_into_are_refused(source, noise, mask):
    """Both shapes are named."""
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask)
    for pack in (
        lambda latents: pack_2x2(latents)[:, :-1],
        lambda latents: pack_2x2(latents)[..., :-1],
        lambda latents: latents.flatten(1)[:, None],
    ):
        shape = ", ".join(str(n) for n in pack(source).shape)
        with pytest.raises(ValueError, match=rf"source's shape \(2, 4, 4, 6\), packed .* have shape \({shape}\)"):
            packed_img2img(masked, source, noise, pack)


def test_latents_of_an_odd_size_have_no_2x2_tokens(mask):
    odd = torch.zeros(2, 4, 5, 6)
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), mask, source_latents=odd)
    with pytest.raises(ValueError, match=r"`source_latents` .* \(2, 4, 5, 6\), .* have shape \(2, 6, 16\)"):
        edit(masked, torch.zeros(2, 6, 16))


@pytest.mark.parametrize("shape", [(1, 2, 4, 4, 6), (1, 4, 3, 4, 6)])
def test_frames_are_refused(shape):
    masked = IEditMaskedScheduler.wrap(FlowMatchEulerDiscreteScheduler(), torch.ones(1, 1, 4, 6))
    with pytest.raises(ValueError, match="video latents cannot be masked"):
        img2img(masked, torch.zeros(shape), torch.zeros(shape), pixelwise_model)
    with pytest.raises(ValueError, match=rf"`source_latents` must have shape .* \({', '.join(map(str, shape))}\)"):
        IEditMaskedScheduler.wrap(masked, torch.ones(1, 1, 4, 6), source_latents=torch.zeros(shape))


def test_a_given_source_of_another_shape_than_the_latents_is_refused(source, noise, mask):
    scheduler = FlowMatchEulerDiscreteScheduler()
    for given in (source[..., :4], source[:, :3], source.repeat(2, 1, 1, 1)):
        masked = IEditMaskedScheduler.wrap(scheduler, mask, source_latents=given)
        shape = ", ".join(str(n) for n in given.shape)
        with pytest.raises(ValueError, match=rf"`source_latents` .* \({shape}\), .* have shape \(2, 4, 4, 6\)"):
            edit(masked, noise)
        with pytest.raises(ValueError, match=rf"`source_latents` .* \({shape}\), .* have shape \(2, 6, 16\)"):
            edit(masked, pack_2x2(noise))


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_given_source_and_one_of_the_pipeline_s_own_do_not_mix(name, source, noise, mask):
    scheduler = make_scheduler(name, {} if "Flow" in name else SD)
    masked = IEditMaskedScheduler.wrap(scheduler, mask, source_latents=source)
    with pytest.raises(ValueError, match=r"`source_latents` is for pipelines that start from noise.*\(2, 4, 4, 6\)"):
        img2img(masked, source, noise, pixelwise_model)
    masked.set_mask(None)
    plain = img2img(scheduler, source, noise, pixelwise_model)[-1][2]
    assert torch.equal(img2img(masked, source, noise, pixelwise_model)[-1][2], plain)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_run_with_a_given_source_that_does_not_start_from_noise_is_refused(name, source, noise, mask):
    scheduler = make_scheduler(name, {} if "Flow" in name else SD)
    masked = IEditMaskedScheduler.wrap(scheduler, mask, source_latents=source)
    masked.set_timesteps(4)
    if hasattr(scheduler, "set_begin_index"):
        masked.set_begin_index(2)
    with pytest.raises(ValueError, match=r"`source_latents` needs a run from pure noise.* first step is at"):
        masked.step(noise, masked.timesteps[2], noise)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("latents.pt", TypeError, "`source_latents` must be a floating point tensor, but is str"),
        (torch.zeros(1, 4, 4, 6, dtype=torch.uint8), TypeError, "`source_latents` must .* a tensor of torch.uint8"),
        (torch.zeros(4, 4, 6), ValueError, r"`source_latents` must have shape .* \(4, 4, 6\)"),
        (torch.zeros(1, 6, 16), ValueError, r"before they are packed, but has shape \(1, 6, 16\)"),
        (torch.zeros(1, 4, 0, 6), ValueError, r"`source_latents` must have shape .* \(1, 4, 0, 6\)"),
    ],
    ids=["path", "uint8", "no batch", "packed", "empty"],
)
def test_bad_source_latents_are_refused(bad, error, message, mask):
    with pytest.raises(error, match=message):
        IEditMaskedScheduler.wrap(DDIMScheduler(), mask, source_latents=bad)
