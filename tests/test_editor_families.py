"""`LocalEditor` on a pipeline of every family: outside the mask the same bytes, and the pipeline as it was."""

import numpy as np
import pytest
import torch
from families import FAMILIES, HEIGHT, WIDTH, small_conditions  # noqa: F401
from PIL import Image

from diffusers_iedit import LocalEditor


SOURCE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
# That two prompts go with one image is the pipelines' own way to several results.
pytestmark = [
    pytest.mark.usefixtures("small_conditions"),
    pytest.mark.filterwarnings("ignore:.*text prompts.*initial image:FutureWarning"),
]
SETTLED = ("height", "width", "max_area", "_auto_resize")


def box_mask(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def edit(name, image, mask, **kwargs):
    """The edit, the array of the mask, and the pipeline's state before and after."""
    family = FAMILIES[name]
    pipe = family.pipe()
    before = dict(vars(pipe)), dict(pipe.config)
    call = {key: value for key, value in family.call.items() if key not in SETTLED}
    generator = torch.Generator().manual_seed(0)
    output = LocalEditor(pipe)(image, "a red car", mask_image=mask, generator=generator, **call, **kwargs)
    assert (dict(vars(pipe)), dict(pipe.config)) == before
    return output.images


@pytest.mark.parametrize("name", FAMILIES)
def test_the_outside_of_the_mask_is_the_same_byte(name):
    # Of sides that no model takes: padded, and cut again.
    source = SOURCE.crop((0, 0, WIDTH - 3, HEIGHT - 5))
    mask = box_mask(source.size, (20, 13, 71, 39))
    (image,) = edit(name, source, mask, processing_resolution=max(source.size))
    changed = (np.asarray(image) != np.asarray(source)).any(axis=-1)
    inside = np.asarray(mask) > 0
    assert image.size == source.size
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_region_is_cut_out_and_several_results_are_set_back(name):
    source = SOURCE.resize((5 * WIDTH, 4 * HEIGHT), Image.Resampling.BICUBIC)
    mask = box_mask(source.size, (300, 120, 340, 150))
    images = edit(name, source, mask, padding_mask_crop=12, processing_resolution=64, num_images_per_prompt=2)
    inside = np.asarray(mask) > 0
    for image in images:
        changed = (np.asarray(image) != np.asarray(source)).any(axis=-1)
        assert not changed[~inside].any()
        assert changed[inside].mean() > 0.5
    assert not np.array_equal(*map(np.asarray, images))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if "strength" not in family.call])
def test_strength_is_an_error_for_a_model_that_starts_from_noise(name):
    with pytest.raises(ValueError, match=r"`strength` was passed, but \w+ has none: it starts from noise"):
        edit(name, SOURCE, box_mask(SOURCE.size, (0, 0, 8, 8)), strength=0.5)


def test_a_latent_consistency_model_runs_its_steps_at_little_strength():
    family = FAMILIES["lcm"]
    editor, steps = LocalEditor(family.pipe()), []

    def count(pipe, step, timestep, tensors):
        steps.append(step)
        return tensors

    mask = box_mask(SOURCE.size, (20, 13, 71, 39))
    options = {"num_inference_steps": 4, "strength": 0.2, "callback_on_step_end": count}
    editor(SOURCE, "a red car", mask_image=mask, processing_resolution=WIDTH, **options)
    assert steps == [0, 1, 2, 3]
