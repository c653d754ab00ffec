"""`search`: things that are small in a large picture, found by their name."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from diffusers_iedit import IEditPipeline, mini
from diffusers_iedit.masking_iedit import MAX_LOOKS, search, segment


UNREACHED = 1 - 1e-12
"""A threshold that no probability in single precision exceeds."""


@pytest.fixture(scope="module")
def models():
    """The mini CLIPSeg, which takes pictures of 96 x 96, and its processor."""
    folder = mini.mask_model_path()
    return CLIPSegForImageSegmentation.from_pretrained(folder).eval(), CLIPSegProcessor.from_pretrained(folder)


def overlap(probability, mask):
    found, truth = probability[0].numpy() > 0.5, np.asarray(mask) > 0
    return (found & truth).sum() / (found | truth).sum()


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_scene_that_fills_the_picture_has_the_mask_of_one_look(models):
    for seed in range(4):
        scene = mini.render(seed)
        result = search(*models, scene.image, scene.thing.name)
        assert torch.equal(result.probability, segment(*models, [scene.image], [scene.thing.name])[0])
        assert result.looks == 1


def test_a_large_thing_in_a_large_picture_has_the_mask_of_one_look(models):
    scene = mini.render(1, things=1)
    image = scene.image.resize((300, 200), Image.Resampling.BICUBIC)
    result = search(*models, image, scene.thing.name)
    assert torch.equal(result.probability, segment(*models, [image], [scene.thing.name])[0])
    assert result.looks == 1


def test_a_small_thing_in_a_large_picture_is_found(models):
    overlaps = []
    for seed in range(3):
        large = mini.render_large(seed, 6)
        assert overlap(segment(*models, [large.image], [large.thing.name])[0], large.mask) < 0.1
        result = search(*models, large.image, large.thing.name)
        assert result.probability.shape == (1, 384, 384)
        overlaps.append(overlap(result.probability, large.mask))
    assert np.mean(overlaps) > 0.9


def test_all_small_things_of_a_name_are_found(models):
    first, second = (mini.render(seed, things=1).swap("ball", "blue") for seed in (4, 5))
    others = [mini.render(seed, things=1).swap("house", "yellow") for seed in range(7)]
    scenes = (first, *others, second)
    large = mini.LargeScene(scenes, 3, 0)
    both = np.asarray(large.mask) | np.asarray(mini.LargeScene(scenes, 3, 8).mask)
    assert overlap(search(*models, large.image, "blue ball").probability, both) > 0.75


def test_what_is_not_in_a_large_picture_is_not_found(models):
    large = mini.render_large(0, 2, things=1)
    absent = next(noun for noun in mini.NOUNS if noun not in [scene.thing.noun for scene in large.scenes])
    result = search(*models, large.image, f"{large.thing.colour} {absent}")
    assert not (result.probability > 0.5).any()
    assert 0 <= result.highest <= 0.5
    assert result.smallest_look == (64, 64)


def test_an_error_says_how_far_the_search_went():
    pipe = IEditPipeline.from_pretrained(mini.model_path())
    large = mini.render_large(0, 2, things=1)
    absent = next(noun for noun in mini.NOUNS if noun not in [scene.thing.noun for scene in large.scenes])
    looks = r"the highest is 0\.\d{3}; number of looks: \d+, the closest at 64x64 pixels"
    with pytest.raises(ValueError, match=rf"image 1 looks like '{absent}'.*`mask_threshold` 0\.5 \({looks}\)"):
        pipe.predict_mask([large.image, large.image], mask_prompt=[large.thing.name, absent])


def test_each_image_of_a_batch_is_searched_alone():
    pipe = IEditPipeline.from_pretrained(mini.model_path())
    pictures = [mini.render_large(seed, 2) for seed in range(2)]
    names = [large.thing.name for large in pictures]
    together = pipe.predict_mask([large.image for large in pictures], mask_prompt=names)
    for large, name, mask in zip(pictures, names, together, strict=True):
        assert np.array_equal(np.asarray(mask), np.asarray(pipe.predict_mask(large.image, mask_prompt=name)[0]))


@pytest.mark.parametrize("size", [(33, 8), (8, 4000), (4000, 8), (250, 190), (1201, 33)])
def test_a_picture_of_any_shape_is_searched_within_the_bound(size):
    model, processor = tiny_models.clipseg(image_size=32)
    result = search(model, processor, noise(*size), "a red car", threshold=UNREACHED)
    assert result.probability.shape == (1, size[1], size[0])
    assert not result.probability.any()
    assert 1 < result.looks <= MAX_LOOKS
    assert min(result.smallest_look) == min(22, *size)


@pytest.mark.parametrize("size", [(32, 32), (20, 31), (8, 8)])
def test_a_picture_no_larger_than_the_models_input_is_looked_at_once(size):
    model, processor = tiny_models.clipseg(image_size=32)
    assert search(model, processor, noise(*size), "a red car", threshold=UNREACHED).looks == 1


def test_tiles_are_as_small_as_the_models_input_where_the_photo_is_eleven_times_as_large():
    # As for a photo of 4000 x 3000 pixels and CLIPSeg's input of 352.
    model, processor = tiny_models.clipseg(image_size=32)
    result = search(model, processor, noise(364, 273), "a red car", threshold=UNREACHED)
    assert max(result.smallest_look) <= 32
    assert 400 < result.looks <= MAX_LOOKS


def test_larger_photos_get_larger_tiles_and_no_more_looks():
    model, processor = tiny_models.clipseg(image_size=32)
    result = search(model, processor, noise(1500, 1100), "a red car", threshold=UNREACHED)
    assert min(result.smallest_look) > 64
    assert 400 < result.looks <= MAX_LOOKS


@pytest.mark.slow
def test_every_bar_of_the_search_holds():
    script = Path(__file__).parents[1] / "training" / "mini" / "measure_search.py"
    measured = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "ok" in measured.stdout
    assert "MISSED" not in measured.stdout, measured.stdout
