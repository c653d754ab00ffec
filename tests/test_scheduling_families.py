"""`IEditMaskedScheduler` in a stock pipeline of every family: local by its scheduler alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, HEIGHT, WIDTH
from PIL import Image

from diffusers_iedit import IEditMaskedScheduler


every_family = pytest.mark.parametrize("name", FAMILIES)
SOURCE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def pixels():
    """`SOURCE` as the VAE gets it: (1, 3, `HEIGHT`, `WIDTH`) in [-1, 1]."""
    return torch.from_numpy(np.array(SOURCE)).permute(2, 0, 1)[None] / 127.5 - 1


def run(family, pipe, **kwargs):
    """The latents that a call ends with, as the pipeline returns them."""
    settings = family.call | {"prompt": "a red car", "image": SOURCE, "output_type": "latent"} | kwargs
    return pipe(generator=torch.Generator().manual_seed(0), **settings).images


def unpack(family, latents):
    """Tokens as a map (batch_size, channels, height, width); maps as they are."""
    if family.token_side is None:
        return latents
    height, width = (size // 8 // family.token_side for size in (HEIGHT, WIDTH))
    return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (height, width)), family.token_side)


def source_of(family, pipe):
    """The latents that are to be kept: given to the scheduler, or the ones that the pipeline encodes by itself."""
    if family.encode is not None:
        return family.encode(pipe, pixels())
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
def test_a_stock_pipeline_becomes_local(name):
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
    latents = unpack(family, run(family, pipe))
    inside = F.adaptive_max_pool2d(mask, latents.shape[-2:]) == 1
    assert torch.equal(torch.where(inside, 0, latents), torch.where(inside, 0, source))
    assert (latents != source).any(dim=1, keepdim=True)[inside].all()
