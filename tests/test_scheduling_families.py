"""`IEditMaskedScheduler` in a stock pipeline of every family: local by its scheduler alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline
from families import FAMILIES, HEIGHT, WIDTH, small_conditions  # noqa: F401
from PIL import Image

from diffusers_iedit import IEditMaskedScheduler


every_family = pytest.mark.parametrize("name", FAMILIES)
SOURCE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def pixels():
    """`SOURCE` as the VAE gets it: (1, 3, `HEIGHT`, `WIDTH`) in [-1, 1]."""
    return torch.from_numpy(np.array(SOURCE)).permute(2, 0, 1)[None] / 127.5 - 1


def run(family, pipe, **kwargs):
    """The latents after the last step: what a call returns, but for Flux.2 Klein, which returns those of its VAE."""
    seen = []

    def see(pipe, step, timestep, tensors):
        seen.append(tensors["latents"])
        return tensors

    settings = family.call | {"prompt": "a red car", "image": SOURCE, "callback_on_step_end": see} | kwargs
    latents = pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **settings).images
    return seen[-1] if family.pipeline_class is Flux2KleinPipeline else latents


def unpack(family, pipe, latents):
    """Tokens as a map (batch_size, channels, height, width); maps as they are."""
    if family.token_side is None:
        return latents
    factor = pipe.image_processor.config.vae_scale_factor
    tokens = latents.transpose(1, 2).unflatten(2, (HEIGHT // factor, WIDTH // factor))
    return F.pixel_shuffle(tokens, family.token_side)


def source_of(family, pipe):
    """The latents that are to be kept: given to the scheduler, or the ones that the pipeline encodes by itself."""
    if family.encode is not None:
        source = family.encode(pipe, pixels())
        return source.reshape(1, -1, *source.shape[-2:])
    stock = pipe.scheduler
    spied = pipe.scheduler = copy.deepcopy(stock)
    noising = "scale_noise" if hasattr(stock, "scale_noise") else "add_noise"
    seen = []

    def spy(latents, *args, **kwargs):
        seen.append(latents)
        return getattr(stock, noising).__func__(spied, latents, *args, **kwargs)

    setattr(spied, noising, spy)
    run(family, pipe)
    pipe.scheduler = stock
    return seen[0].reshape(1, -1, *seen[0].shape[-2:])


@every_family
def test_a_stock_pipeline_becomes_local(name, small_conditions):  # noqa: F811
    family = FAMILIES[name]
    pipe = family.pipe()
    stock, plain = pipe.scheduler, run(family, pipe)
    source = source_of(family, pipe)
    given = {} if family.encode is None else {"source_latents": source}

    pipe.scheduler = IEditMaskedScheduler.wrap(stock, torch.ones(1, 1, HEIGHT, WIDTH), **given)
    assert torch.equal(run(family, pipe), plain)

    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., 8:40, 24:72] = 1
    pipe.scheduler = IEditMaskedScheduler.wrap(stock, mask, **given)
    latents = unpack(family, pipe, run(family, pipe))
    inside = F.adaptive_max_pool2d(mask, latents.shape[-2:]) == 1
    assert torch.equal(torch.where(inside, 0, latents), torch.where(inside, 0, source))
    assert (latents != source).any(dim=1, keepdim=True)[inside].all()


@pytest.mark.parametrize("name", ["sdxl", "flux", "z-image", "qwen-image", "flux-kontext", "flux2", "qwen-image-edit"])
def test_several_images_of_a_prompt_keep_one_source(name, small_conditions):  # noqa: F811
    family = FAMILIES[name]
    pipe = family.pipe()
    source = source_of(family, pipe)
    given = {} if family.encode is None else {"source_latents": source}
    mask = torch.zeros(1, 1, HEIGHT, WIDTH)
    mask[..., : WIDTH // 2] = 1
    pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, mask, **given)
    first, second = unpack(family, pipe, run(family, pipe, num_images_per_prompt=2))
    half = source.shape[-1] // 2
    for latents in (first, second):
        assert torch.equal(latents[..., half:], source[0, ..., half:])
    assert not torch.equal(first, second)


def test_an_editing_pipeline_that_is_told_to_begin_late_keeps_the_source():
    """`sigmas` below one leave Flux Kontext's start as it is: noise."""
    family = FAMILIES["flux-kontext"]
    pipe = family.pipe()
    source = source_of(family, pipe)
    seen = []

    def see(pipe, step, timestep, tensors):
        seen.append(unpack(family, pipe, tensors["latents"]))
        return tensors

    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    masked = IEditMaskedScheduler.wrap(pipe.scheduler, torch.zeros(1, 1, HEIGHT, WIDTH), source_latents=source)
    pipe.scheduler = masked
    run(family, pipe, num_inference_steps=2, sigmas=[0.8, 0.4], callback_on_step_end=see)
    assert 0 < masked.sigmas[1] < masked.sigmas[0] < 1
    torch.testing.assert_close(seen[0], (1 - masked.sigmas[1]) * source + masked.sigmas[1] * noise)
    assert torch.equal(seen[1], source)


def test_an_image_to_image_pipeline_is_given_no_source():
    family = FAMILIES["flux"]
    pipe = family.pipe()
    source = source_of(family, pipe)
    pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, torch.ones(1, 1, 8, 12), source_latents=source)
    with pytest.raises(ValueError, match="`source_latents` is for pipelines that start from noise"):
        run(family, pipe)


def test_an_editing_pipeline_needs_a_source_of_its_own_size():
    family = FAMILIES["flux-kontext"]
    pipe = family.pipe()
    source = source_of(family, pipe)[..., :-2]
    pipe.scheduler = IEditMaskedScheduler.wrap(pipe.scheduler, torch.ones(1, 1, 8, 12), source_latents=source)
    with pytest.raises(ValueError, match=r"`source_latents` .* \(1, 4, 8, 10\), packed .* have shape \(1, 24, 16\)"):
        run(family, pipe)
