"""IEditPipeline on the trained mini models: where it finds things, and that nothing moves."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_iedit import IEditPipeline, mini


@pytest.fixture(scope="module")
def pipe():
    pipe = IEditPipeline.from_pretrained(mini.model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_mask_prompt_finds_the_thing_it_names(pipe):
    scenes = [mini.render(seed, things=2) for seed in range(8)]
    masks = pipe.predict_mask(
        [scene.image for scene in scenes], mask_prompt=[scene.thing.name for scene in scenes], output_type="np"
    )
    overlaps = []
    for mask, scene in zip(masks[..., 0] > 0, scenes, strict=True):
        truth = np.asarray(scene.mask) > 0
        overlaps.append((mask & truth).sum() / (mask | truth).sum())
    assert np.mean(overlaps) > 0.65


def test_a_mask_prompt_for_what_is_not_there_is_an_error(pipe):
    scene = mini.render(0, things=1)
    absent = next(noun for noun in mini.NOUNS if noun != scene.thing.noun)
    with pytest.raises(ValueError, match=f"'{absent}'"):
        pipe.predict_mask(scene.image, mask_prompt=absent, mask_threshold=0.9)


def offset(image, source):
    """By how many pixels (down, right) `image` is shifted against `source`: where their correlation peaks."""
    grey, other = (np.asarray(each.convert("L")).astype(float) for each in (source, image))
    spectrum = np.fft.fft2(grey - grey.mean()).conj() * np.fft.fft2(other - other.mean())
    correlation = np.fft.ifft2(spectrum).real
    peak = np.unravel_index(correlation.argmax(), correlation.shape)
    return tuple(int((at + side // 2) % side - side // 2) for at, side in zip(peak, correlation.shape, strict=True))


@pytest.mark.parametrize(
    ("size", "processing_resolution"), [((64, 64), None), ((61, 53), None), ((50, 47), None), ((203, 150), 64)]
)
def test_the_output_is_not_shifted_against_the_source(pipe, size, processing_resolution):
    scene = mini.render(3, things=1)
    source = scene.image.resize(size, Image.Resampling.BICUBIC)
    # Hardly any noise, and no compositing: what comes back is the whole picture through VAE and UNet.
    result = pipe(
        source,
        scene.caption,
        strength=0.1,
        guidance_scale=1,
        num_inference_steps=20,
        processing_resolution=processing_resolution,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert result.size == size
    assert offset(result, source) == (0, 0)
    moved = Image.fromarray(np.roll(np.asarray(result), (1, -2), axis=(0, 1)))
    assert offset(moved, source) == (1, -2)
