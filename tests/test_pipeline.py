"""IEditPipeline on tiny random models: what it takes, what it gives back, and what it refuses."""

import inspect

import icc_profiles
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from diffusers.utils import logging
from PIL import Image, ImageDraw

from diffusers_iedit import IEditMaskedScheduler, IEditPipeline, IEditPipelineOutput


QUICK = {"prompt": "a blue car", "num_inference_steps": 4, "strength": 0.75}


def make_pipe(cls=IEditPipeline, seed=0, **components):
    pipe = cls(**(tiny_models.sd_components(seed=seed) | components))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return make_pipe()


@pytest.fixture
def mask_pipe():
    model, processor = tiny_models.clipseg()
    return make_pipe(mask_model=model, mask_processor=processor)


def picture(width=64, height=64, seed=0, mode="RGB"):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode) if mode != "RGBA" else Image.fromarray(noise)


def box_mask(width=64, height=64, box=(16, 16, 47, 47), value=255):
    mask = Image.new("L", (width, height), 0)
    ImageDraw.Draw(mask).rectangle(box, fill=value)
    return mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def differing(image, source):
    """(H, W) bool: where any byte differs."""
    return (np.asarray(image) != np.asarray(source)).any(axis=-1)


# What an edit is


def test_the_signature_is_the_published_one():
    parameters = inspect.signature(IEditPipeline.__call__).parameters
    assert list(parameters)[:6] == ["self", "image", "prompt", "mask_image", "mask_prompt", "source_prompt"]
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values())
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert (defaults["strength"], defaults["guidance_scale"], defaults["num_inference_steps"]) == (0.7, 7.5, 50)


def test_every_parameter_is_documented():
    for name in list(inspect.signature(IEditPipeline.__call__).parameters)[1:]:
        assert f"{name} (" in IEditPipeline.__call__.__doc__, name


def test_outside_the_mask_every_byte_is_the_source_and_inside_it_changed(pipe):
    source, mask = picture(), box_mask()
    result = pipe(source, mask_image=mask, generator=generator(), **QUICK)
    assert isinstance(result, IEditPipelineOutput)
    changed = differing(result.images[0], source)
    inside = np.asarray(mask) > 0
    assert not changed[~inside].any()
    assert changed[inside].mean() > 0.9


def test_the_whole_mask_region_is_the_edit_even_where_it_cuts_a_latent_cell(pipe):
    source, mask = picture(), box_mask(box=(13, 9, 50, 43))
    result = pipe(source, mask_image=mask, generator=generator(), **QUICK).images[0]
    inside = np.asarray(mask) > 0
    assert differing(result, source)[inside].mean() > 0.9


@pytest.mark.parametrize(
    "scheduler_class",
    [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler],
)
@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_without_a_mask_it_is_the_stock_img2img_pipeline_to_the_bit(scheduler_class, guidance_scale):
    ours, stock = make_pipe(), make_pipe(StableDiffusionImg2ImgPipeline)
    for each in (ours, stock):
        each.scheduler = scheduler_class.from_config(each.scheduler.config)
    arguments = QUICK | {"guidance_scale": guidance_scale, "output_type": "np"}
    expected = stock(image=picture(), generator=generator(), **arguments).images
    result = ours(picture(), generator=generator(), **arguments)
    assert np.array_equal(result.images, expected)
    assert result.masks is None


def test_keep_background_false_is_the_plain_decode_of_the_blended_latents(pipe):
    stock = make_pipe(StableDiffusionImg2ImgPipeline)
    latent_mask = torch.zeros(1, 1, 8, 8)
    latent_mask[..., 2:6, 2:6] = 1
    stock.scheduler = IEditMaskedScheduler.wrap(stock.scheduler, latent_mask)
    expected = stock(image=picture(), generator=generator(), output_type="np", **QUICK).images
    result = pipe(
        picture(), mask_image=box_mask(), keep_background=False, generator=generator(), output_type="np", **QUICK
    )
    assert np.array_equal(result.images, expected)


def test_latents_outside_the_mask_end_as_the_clean_source_latents(pipe):
    source = torch.randn(1, 4, 8, 8, generator=generator(1))
    latents = pipe(source, mask_image=box_mask(), generator=generator(), output_type="latent", **QUICK).images
    assert torch.equal(latents[..., :2, :], source[..., :2, :])
    assert not torch.equal(latents[..., 2:6, 2:6], source[..., 2:6, 2:6])


def test_a_soft_mask_stays_soft(pipe):
    source = picture()
    soft = Image.linear_gradient("L").resize((64, 64))
    result = pipe(source, mask_image=soft, generator=generator(), **QUICK)
    assert np.array_equal(np.asarray(result.masks[0]), np.asarray(soft))
    change = np.abs(np.asarray(result.images[0]).astype(int) - np.asarray(source)).mean(axis=(1, 2))
    assert change[:16].mean() < 0.5 * change[-16:].mean()


def test_the_pipelines_own_scheduler_is_left_as_it_was(pipe):
    scheduler = pipe.scheduler
    pipe(picture(), mask_image=box_mask(), **QUICK)
    assert pipe.scheduler is scheduler
    assert type(scheduler) is DDIMScheduler


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler])
def test_a_scheduler_swapped_by_the_user_edits_locally_too(scheduler_class):
    pipe = make_pipe()
    pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    latents = torch.randn(1, 4, 8, 8, generator=generator(1))
    edited = pipe(latents, mask_image=box_mask(), generator=generator(), output_type="latent", **QUICK).images
    assert torch.equal(edited[..., :2, :], latents[..., :2, :])


# What it takes


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (65, 64), (100, 75), (64, 200)])
def test_any_size_from_eight_pixels_up_comes_back_as_it_went_in(pipe, size):
    source, mask = picture(*size), box_mask(*size, box=(2, 2, 6, 6))
    result = pipe(source, mask_image=mask, generator=generator(), **QUICK)
    assert result.images[0].size == size
    assert result.masks[0].size == size
    changed = differing(result.images[0], source)
    assert changed[np.asarray(mask) > 0].any()
    assert not changed[np.asarray(mask) == 0].any()
    assert pipe(source, generator=generator(), **QUICK).images[0].size == size


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"])
def test_pil_images_of_any_mode_give_rgb(pipe, mode):
    grey = picture(16, 16).convert("L")
    if mode == "LAB":
        source = Image.merge("LAB", (grey, grey, grey))
    elif mode in ("I", "I;16"):
        source = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).convert(mode)
    else:
        source = grey.convert("RGB").convert(mode)
    mask = box_mask(16, 16, (0, 0, 7, 15))
    result = pipe(source, mask_image=mask, generator=generator(), **QUICK).images[0]
    assert result.mode == "RGB"
    if mode in ("L", "RGB", "I", "I;16"):
        assert np.array_equal(np.asarray(result)[:, 8:], np.asarray(grey.convert("RGB"))[:, 8:])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_kept_and_returned(pipe, mode):
    source = picture(mode="RGBA").convert(mode)
    result = pipe(source, mask_image=box_mask(), generator=generator(), **QUICK).images[0]
    assert result.mode == "RGBA"
    expected = source.convert("RGBA")
    assert np.array_equal(np.asarray(result.getchannel("A")), np.asarray(expected.getchannel("A")))
    assert not differing(result, expected)[np.asarray(box_mask()) == 0].any()


def test_a_palette_with_a_transparent_colour_has_alpha(pipe):
    source = picture().convert("P")
    source.info["transparency"] = 0
    assert pipe(source, generator=generator(), **QUICK).images[0].mode == "RGBA"


def with_orientation(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = orientation
    return image


def test_exif_orientation_is_honoured_for_image_and_mask_alike(pipe):
    upright, upright_mask = picture(64, 40), box_mask(64, 40, (4, 8, 30, 20))
    expected = pipe(upright, mask_image=upright_mask, generator=generator(), **QUICK)
    turned, turned_mask = (
        with_orientation(each.transpose(Image.Transpose.ROTATE_90), 6) for each in (upright, upright_mask)
    )
    result = pipe(turned, mask_image=turned_mask, generator=generator(), **QUICK)
    assert result.images[0].size == (64, 40)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))
    assert np.array_equal(np.asarray(result.masks[0]), np.asarray(upright_mask))


def test_pil_numpy_and_torch_inputs_are_equivalent(pipe):
    source, mask = picture(), box_mask()
    expected = pipe(source, mask_image=mask, generator=generator(), **QUICK).images[0]
    array, mask_array = np.asarray(source), np.asarray(mask)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1) / 255
    forms = [
        (array, mask_array),
        (array[None], mask_array[None]),
        (array.astype(np.float32) / 255, mask_array > 0),
        ([array], [mask_array[..., None]]),
        (tensor, torch.from_numpy(mask_array / 255)),
        (tensor[None], torch.from_numpy(mask_array / 255)[None, None]),
        ([tensor], [torch.from_numpy(mask_array > 0)]),
    ]
    for image, mask_image in forms:
        result = pipe(image, mask_image=mask_image, generator=generator(), **QUICK).images[0]
        assert np.array_equal(np.asarray(result), np.asarray(expected))


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_output_types_hold_the_same_picture_and_an_exact_background(pipe, output_type):
    source, mask = picture(), box_mask()
    reference = pipe(source, mask_image=mask, generator=generator(), **QUICK)
    result = pipe(source, mask_image=mask, generator=generator(), output_type=output_type, **QUICK)
    images, masks = result.images, result.masks
    if output_type == "pt":
        assert images.shape == (1, 3, 64, 64)
        assert masks.shape == (1, 1, 64, 64)
        images, masks = images.permute(0, 2, 3, 1).numpy(), masks.permute(0, 2, 3, 1).numpy()
    elif output_type == "pil":
        images, masks = (np.stack([np.asarray(image) / 255 for image in each]) for each in (images, masks))
        masks = masks[..., None]
    assert images.shape == (1, 64, 64, 3)
    assert masks.shape == (1, 64, 64, 1)
    assert np.array_equal((images[0] * 255).round(), np.asarray(reference.images[0]))
    outside = masks[0, ..., 0] == 0
    assert np.array_equal((images[0] * 255).round()[outside], np.asarray(source)[outside])


def test_return_dict_false_gives_the_fields_as_a_tuple(pipe):
    images, masks, nsfw = pipe(picture(), mask_image=box_mask(), return_dict=False, **QUICK)
    assert len(images) == len(masks) == 1
    assert nsfw is None


# Large photos


def test_processing_resolution_edits_small_and_keeps_the_large_background(pipe):
    source, mask = picture(400, 300), box_mask(400, 300, (100, 80, 260, 200))
    shapes = []

    def note_size(pipe, step, timestep, kwargs):
        shapes.append(tuple(kwargs["latents"].shape))
        return kwargs

    result = pipe(source, mask_image=mask, processing_resolution=64, callback_on_step_end=note_size, **QUICK).images[0]
    assert set(shapes) == {(1, 4, 6, 8)}
    assert result.size == (400, 300)
    changed = differing(result, source)
    assert changed[np.asarray(mask) > 0].mean() > 0.9
    assert not changed[np.asarray(mask) == 0].any()


# Batches


def test_every_result_of_a_batch_is_the_one_its_item_gets_alone(mask_pipe):
    mask_pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(mask_pipe.scheduler.config)
    images, prompts = [picture(seed=seed) for seed in range(3)], ["a car", "a blue boat on the sea", "trees"]
    masks = [box_mask(box=(8 * seed, 8, 8 * seed + 30, 40)) for seed in range(3)]
    arguments = {"num_inference_steps": 4, "strength": 0.75, "output_type": "np"}
    together = mask_pipe(images, prompts, mask_image=masks, generator=[generator(s) for s in range(3)], **arguments)
    for index in range(3):
        alone = mask_pipe(
            images[index], prompts[index], mask_image=masks[index], generator=generator(index), **arguments
        )
        np.testing.assert_allclose(together.images[index], alone.images[0], atol=1e-4)
        assert np.array_equal(together.masks[index], alone.masks[0])


def test_mask_prompts_of_a_batch_are_each_ones_own(mask_pipe):
    images, terms = [picture(seed=seed) for seed in range(2)], ["car", "a tree"]
    together = mask_pipe.predict_mask(images, mask_prompt=terms, mask_threshold=0.4)
    for index in range(2):
        alone = mask_pipe.predict_mask(images[index], mask_prompt=terms[index], mask_threshold=0.4)
        assert np.array_equal(np.asarray(together[index]), np.asarray(alone[0]))


def test_num_images_per_prompt_gives_adjacent_results_with_their_own_noise(pipe):
    images = [picture(seed=0), picture(seed=1)]
    generators = [generator(seed) for seed in range(8)]
    arguments = {"num_inference_steps": 4, "strength": 0.75, "output_type": "np", "mask_image": box_mask()}
    result = pipe(images, "a car", num_images_per_prompt=4, generator=generators, **arguments)
    assert len(result.images) == len(result.masks) == 8
    for index in range(8):
        alone = pipe(images[index // 4], "a car", generator=generator(index), **arguments)
        np.testing.assert_allclose(result.images[index], alone.images[0], atol=1e-4)


def test_one_image_is_edited_towards_each_of_several_prompts(pipe):
    prompts = ["a car", "a boat"]
    arguments = {"num_inference_steps": 4, "strength": 0.75, "output_type": "np", "mask_image": box_mask()}
    result = pipe(picture(), prompts, generator=[generator(0), generator(0)], **arguments)
    for index, prompt in enumerate(prompts):
        alone = pipe(picture(), prompt, generator=generator(), **arguments)
        np.testing.assert_allclose(result.images[index], alone.images[0], atol=1e-4)


def test_alpha_belongs_to_its_own_image_of_a_batch(pipe):
    result = pipe([picture(), picture(mode="RGBA")], "a car", num_inference_steps=2, strength=0.5)
    assert [image.mode for image in result.images] == ["RGB", "RGBA"]


# Masks from words


def test_a_mask_prompt_edits_inside_the_predicted_mask_and_returns_it(mask_pipe):
    source = picture()
    expected = mask_pipe.predict_mask(source, mask_prompt="car", mask_threshold=0.45)
    result = mask_pipe(source, mask_prompt="car", mask_threshold=0.45, generator=generator(), **QUICK)
    assert np.array_equal(np.asarray(result.masks[0]), np.asarray(expected[0]))
    inside = np.asarray(result.masks[0]) > 0
    assert 0 < inside.mean() < 1
    assert not differing(result.images[0], source)[~inside].any()


def test_a_source_prompt_masks_the_words_that_differ(mask_pipe):
    by_captions = mask_pipe.predict_mask(
        picture(), "a blue car on grass", source_prompt="a red car on grass", mask_threshold=0.45
    )
    by_term = mask_pipe.predict_mask(picture(), mask_prompt="red car", mask_threshold=0.45)
    assert np.array_equal(np.asarray(by_captions[0]), np.asarray(by_term[0]))


def test_source_prompt_auto_captions_the_source():
    mask_model, mask_processor = tiny_models.clipseg()
    captioner, caption_processor = tiny_models.blip()
    pipe = make_pipe(
        mask_model=mask_model, mask_processor=mask_processor, captioner=captioner, caption_processor=caption_processor
    )
    inputs = caption_processor(images=picture(), return_tensors="pt")
    caption = caption_processor.decode(captioner.generate(**inputs)[0], skip_special_tokens=True)
    automatic = pipe(picture(), "a unicorn", source_prompt="auto", mask_threshold=0.3, num_inference_steps=2)
    given = pipe(picture(), "a unicorn", source_prompt=caption, mask_threshold=0.3, num_inference_steps=2)
    assert np.array_equal(np.asarray(automatic.masks[0]), np.asarray(given.masks[0]))


def test_the_term_of_a_source_prompt_is_logged(mask_pipe, caplog):
    with caplog.at_level("INFO", logger="diffusers_iedit.masking_iedit"):
        mask_pipe.predict_mask(picture(), "a boat", source_prompt="A Red Car!", mask_threshold=0.3)
    assert "Looking for 'Red Car': what the prompt changes in 'A Red Car!'." in caplog.text


def test_dilation_and_feather_shape_the_mask_in_image_pixels(pipe):
    mask = box_mask(box=(24, 24, 39, 39))
    result = pipe(picture(), mask_image=mask, mask_dilation=4, mask_feather=3, generator=generator(), **QUICK)
    used = np.asarray(result.masks[0])
    assert np.array_equal(used > 0, np.asarray(box_mask(box=(20, 20, 43, 43))) > 0)
    assert used[32, 20:25].tolist() == [64, 128, 191, 255, 255]
    assert not differing(result.images[0], picture())[used == 0].any()


def test_an_empty_predicted_mask_says_what_was_looked_for(mask_pipe):
    with pytest.raises(
        ValueError, match=r"image 0 looks like 'zeppelin'.*`mask_threshold`.*highest is [01]\.[0-9]{3};"
    ):
        mask_pipe(picture(), mask_prompt="zeppelin", mask_threshold=1 - 1e-12, **QUICK)


def test_a_mask_prompt_without_a_mask_model_says_how_to_load_one(pipe):
    with pytest.raises(ValueError, match=r"(?s)`mask_prompt`.*CIDAS/clipseg-rd64-refined"):
        pipe(picture(), mask_prompt="car", **QUICK)


def test_source_prompt_auto_without_a_captioner_says_how_to_load_one(mask_pipe):
    with pytest.raises(ValueError, match=r"(?s)captioner.*Salesforce/blip-image-captioning-large"):
        mask_pipe(picture(), source_prompt="auto", **QUICK)


def test_a_source_prompt_that_differs_in_nothing_is_an_error(mask_pipe):
    with pytest.raises(ValueError, match="differ in no word"):
        mask_pipe(picture(), "a car", source_prompt="the car")


# Strength


@pytest.mark.parametrize(("strength", "steps"), [(0.3, 3), (0.7, 7), (1.0, 10)])
def test_strength_runs_the_documented_number_of_steps(pipe, strength, steps):
    ran = []
    pipe(
        picture(16, 16),
        "a car",
        strength=strength,
        num_inference_steps=10,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: ran.append(step) or kwargs,
    )
    assert len(ran) == steps


@pytest.mark.parametrize(
    ("strength", "steps", "smallest_strength", "smallest_steps"),
    [(0.01, 50, 0.02, 100), (0.3, 3, 0.3334, 4), (0.0, 50, 0.02, None), (0.02, 49, 0.0205, 50)],
)
def test_a_strength_that_would_run_no_step_names_the_smallest_that_would(
    pipe, strength, steps, smallest_strength, smallest_steps
):
    with pytest.raises(ValueError, match=f"would run no step.*{smallest_strength}") as error:
        pipe(picture(16, 16), "a car", strength=strength, num_inference_steps=steps)
    pipe(picture(16, 16), "a car", strength=smallest_strength, num_inference_steps=steps)
    if smallest_steps:
        assert f"smallest step count {smallest_steps}" in str(error.value)
        pipe(picture(16, 16), "a car", strength=strength, num_inference_steps=smallest_steps)


# What the stock pipeline offers


def test_callbacks_see_and_replace_tensors(pipe):
    def zero(pipe, step, timestep, kwargs):
        assert set(kwargs) == {"latents", "prompt_embeds"}
        if step == pipe.num_timesteps - 1:
            kwargs["latents"] = torch.zeros_like(kwargs["latents"])
        return kwargs

    latents = pipe(
        picture(),
        callback_on_step_end=zero,
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
        output_type="latent",
        **QUICK,
    ).images
    assert not latents.any()


def test_interrupt_stops_early_and_still_keeps_the_background(pipe):
    ran = []

    def stop(pipe, step, timestep, kwargs):
        ran.append(step)
        pipe._interrupt = True
        return kwargs

    source, mask = picture(), box_mask()
    result = pipe(source, mask_image=mask, callback_on_step_end=stop, **QUICK).images[0]
    assert ran == [0]
    assert not differing(result, source)[np.asarray(mask) == 0].any()


def test_prompt_embeds_stand_in_for_the_prompt(pipe):
    expected = pipe(picture(), generator=generator(), output_type="np", **QUICK).images
    prompt_embeds, negative_prompt_embeds = pipe.encode_prompt(QUICK["prompt"], "cpu", 1, True)
    result = pipe(
        picture(),
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        generator=generator(),
        output_type="np",
        num_inference_steps=4,
        strength=0.75,
    ).images
    assert np.array_equal(result, expected)


def test_one_negative_prompt_serves_a_batch(pipe):
    result = pipe([picture(), picture(seed=1)], ["a car", "a boat"], negative_prompt="blurry", num_inference_steps=2)
    assert len(result.images) == 2


def test_timesteps_and_sigmas_of_ones_own():
    ran = []
    custom = make_pipe()
    custom.scheduler = EulerDiscreteScheduler.from_config(custom.scheduler.config)
    custom(
        picture(),
        "a car",
        mask_image=box_mask(),
        sigmas=[14.6, 5.0, 1.0, 0.2, 0.0],
        strength=0.5,
        callback_on_step_end=lambda pipe, step, timestep, kwargs: ran.append(step) or kwargs,
    )
    assert ran == [0, 1]


@pytest.fixture
def diffusers_log(caplog):
    """Warnings of diffusers' loggers, which do not reach pytest otherwise."""
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def test_a_too_long_prompt_warns_with_the_lost_part(pipe, diffusers_log):
    pipe(picture(16, 16), "x" * 80 + " zebra", num_inference_steps=2)
    assert "truncated" in diffusers_log.text
    assert "zebra" in diffusers_log.text


def test_a_photo_far_above_the_models_size_warns_and_names_the_way_out(pipe, caplog):
    pipe(picture(200, 16), "a car", num_inference_steps=2)
    assert "`processing_resolution=64`" in caplog.text
    caplog.clear()
    pipe(picture(200, 16), "a car", num_inference_steps=2, processing_resolution=64)
    assert "processing_resolution" not in caplog.text


def test_the_safety_checkers_black_image_is_not_composited():
    checker, feature_extractor = tiny_models.safety_checker(flags_everything=True)
    pipe = make_pipe(safety_checker=checker, feature_extractor=feature_extractor)
    result = pipe(picture(), mask_image=box_mask(), **QUICK)
    assert result.nsfw_content_detected == [True]
    assert not np.asarray(result.images[0]).any()


def test_a_harmless_image_passes_the_safety_checker_with_its_background_exact():
    checker, feature_extractor = tiny_models.safety_checker()
    pipe = make_pipe(safety_checker=checker, feature_extractor=feature_extractor)
    source, mask = picture(), box_mask()
    result = pipe(source, mask_image=mask, **QUICK)
    assert result.nsfw_content_detected == [False]
    assert not differing(result.images[0], source)[np.asarray(mask) == 0].any()


def test_half_precision_keeps_the_background_exact(pipe):
    half = make_pipe().to(torch.bfloat16)
    source, mask = picture(), box_mask()
    result = half(source, mask_image=mask, generator=generator(), **QUICK).images[0]
    changed = differing(result, source)
    assert changed[np.asarray(mask) > 0].any()
    assert not changed[np.asarray(mask) == 0].any()


# Results that are no picture


def zero_snr_pipe(**config):
    # "trailing" begins at the last timestep, the one without any signal.
    scheduler = DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1, clip_sample=False, **config
    )
    return make_pipe(scheduler=scheduler)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
@pytest.mark.parametrize("mask_image", [None, box_mask()])
def test_noise_prediction_from_pure_noise_is_an_error_that_names_strength_and_scheduler(output_type, mask_image):
    pipe = zero_snr_pipe()
    arguments = {"mask_image": mask_image, "output_type": output_type, "num_inference_steps": 4, "prompt": "a car"}
    with pytest.raises(
        FloatingPointError, match=r"denoised latents.* result 0 of 1.*`rescale_betas_zero_snr`.*below 1"
    ):
        pipe(picture(), strength=1.0, **arguments)
    pipe(picture(), strength=0.75, **arguments)
    zero_snr_pipe(prediction_type="v_prediction")(picture(), strength=1.0, **arguments)


def test_a_vae_that_overflows_in_float16_is_an_error_and_runs_alone_in_float32():
    pipe = make_pipe()
    with torch.no_grad():
        # Far below float16's largest number, 65504, as a weight, above it in the sum that the convolution takes.
        pipe.vae.decoder.conv_in.weight.copy_(pipe.vae.decoder.conv_in.weight.sign() * 4e4)
    pipe.to(torch.float16)
    with pytest.raises(FloatingPointError, match=r"decoded picture.*float16.*`pipe\.vae\.to\(torch\.float32\)`"):
        pipe(picture(), mask_image=box_mask(), generator=generator(), **QUICK)
    pipe(picture(), generator=generator(), output_type="latent", **QUICK)
    pipe.vae.to(torch.float32)
    result = pipe(picture(), mask_image=box_mask(), generator=generator(), **QUICK).images[0]
    assert differing(result, picture()).any()


def test_a_vae_that_overflows_while_encoding_is_an_error_before_the_first_step():
    pipe = make_pipe()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.copy_(pipe.vae.encoder.conv_in.weight.sign() * 6e4)
    pipe.to(torch.float16)
    steps = []
    with pytest.raises(FloatingPointError, match=r"latents of `image` hold NaN.*`pipe\.vae\.to\(torch\.float32\)`"):
        pipe(picture(), callback_on_step_end=lambda pipe, step, t, kwargs: steps.append(step) or kwargs, **QUICK)
    assert not steps
    pipe.vae.to(torch.float32)
    pipe(picture(), **QUICK)


@pytest.mark.parametrize("component", ["unet", "vae"])
def test_weights_with_nan_are_an_error(component):
    pipe = make_pipe()
    next(getattr(pipe, component).parameters()).data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinity in result 0, 1 of 2"):
        pipe([picture(), picture(seed=1)], **QUICK)


def test_latents_with_nan_are_an_error(pipe):
    latents = torch.zeros(2, 4, 8, 8)
    latents[1, 0, 3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="latents of `image` hold NaN or infinity in result 1 of 2"):
        pipe(latents, mask_image=box_mask(), output_type="latent", **QUICK)


def test_a_mask_model_that_gives_nan_is_an_error(mask_pipe):
    next(mask_pipe.mask_model.decoder.parameters()).data.fill_(float("nan"))
    for run in (mask_pipe, mask_pipe.predict_mask):
        with pytest.raises(FloatingPointError, match="`mask_model` gives NaN"):
            run(picture(), "a boat", mask_prompt="car")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": []}, "`image` is empty"),
        ({"image": "photo.png"}, "`image` has to be .* contains str"),
        ({"image": picture(1, 1)}, "`image` has to be at least 8 pixels a side, but is 1x1"),
        ({"image": np.full((16, 16, 3), np.nan)}, "`image` contains NaN"),
        ({"image": np.full((16, 16, 3), 2.0)}, r"`image` has to have values in \[0, 1\]"),
        ({"image": torch.full((3, 16, 16), -1.0)}, r"`image` has to have values in \[0, 1\]"),
        ({"image": np.zeros((16, 16, 5))}, r"`image` has to have shape .* \(16, 16, 5\)"),
        ({"image": np.zeros((16, 16, 3), dtype=np.int64)}, "`image` has to be of dtype"),
        ({"image": [picture(16, 16), picture(16, 24)]}, "different sizes .*16x16, 16x24"),
        ({"image": [picture(), picture()], "prompt": ["a", "b", "c"]}, "`prompt` holds 3 prompts.* 2 images"),
        ({"mask_image": box_mask(32, 64)}, "`mask_image` has to have the image's size, 64x64 pixels, but is 32x64"),
        ({"mask_image": [box_mask()] * 3}, "`mask_image` holds 3 masks"),
        ({"mask_image": np.full((64, 64), np.nan)}, "`mask_image` contains NaN"),
        ({"mask_image": np.full((64, 64), 1.5)}, r"`mask_image` has to have values in \[0, 1\]"),
        ({"mask_image": np.full((64, 64), -0.5)}, r"`mask_image` has to have values in \[0, 1\]"),
        ({"mask_image": np.ones((64, 64), dtype=np.uint8)}, "`mask_image` is uint8 with values 0 and 1"),
        ({"mask_image": np.zeros((64, 64))}, "`mask_image` is zero everywhere"),
        ({"mask_image": np.zeros((64, 64, 3, 1, 1))}, "`mask_image` has to have shape"),
        ({"mask_image": np.zeros((0, 64), dtype=np.uint8)}, r"`mask_image` has no pixels: its shape is \(0, 64\)"),
        ({"mask_image": torch.zeros(1, 1, 0, 0)}, r"`mask_image` has no pixels"),
        ({"mask_image": []}, "`mask_image` holds 0 masks"),
        ({"image": np.zeros((0, 0, 3), dtype=np.uint8)}, "`image` has to be at least 8 pixels a side, but is 0x0"),
        ({"image": Image.new("RGB", (0, 0))}, "`image` has to be at least 8 pixels a side, but is 0x0"),
        ({"prompt": 7}, "`prompt` has to be a string or a list of strings, but contains int"),
        ({"negative_prompt": [picture()]}, "`negative_prompt` has to be a string .* contains Image"),
        ({"mask_prompt": box_mask()}, "`mask_prompt` has to be a string .* contains Image"),
        ({"source_prompt": ["a car", None]}, "`source_prompt` has to be a string .* contains NoneType"),
        ({"mask_image": "mask.png"}, "`mask_image` has to be .* contains str"),
        ({"mask_image": box_mask(), "mask_prompt": "car"}, "only one of"),
        ({"mask_image": box_mask(), "mask_dilation": -1}, "`mask_dilation` has to be an integer of at least 0"),
        ({"mask_image": box_mask(), "mask_feather": 1.5}, "`mask_feather` has to be an integer of at least 0"),
        ({"strength": -0.1}, "`strength` has to be"),
        ({"strength": 1.1}, "`strength` has to be"),
        ({"strength": float("nan")}, "`strength` has to be"),
        ({"num_inference_steps": 0}, "`num_inference_steps` has to be a positive integer, but is 0"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` has to be a positive integer"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` has to be a finite number"),
        ({"processing_resolution": -512}, "`processing_resolution` has to be an integer of at least 8"),
        ({"output_type": "jpeg"}, "`output_type` has to be"),
        ({"prompt": None}, "Provide either `prompt` or `prompt_embeds`"),
        ({"prompt_embeds": torch.zeros(1, 77, 32)}, "Cannot forward both `prompt`"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` holds 2 entries"),
        (
            {"negative_prompt_embeds": torch.zeros(3, 77, 32)},
            "`negative_prompt_embeds` holds 3 entries for a batch of 1",
        ),
        ({"generator": [generator()] * 2}, "`generator` holds 2 generators for 1 results"),
    ],
)
def test_bad_input_is_named(pipe, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(**({"image": picture()} | QUICK | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Pass `mask_prompt`, or `source_prompt`"),
        ({"mask_prompt": "car", "source_prompt": "a car", "prompt": "a boat"}, "only one of"),
        ({"source_prompt": "a car"}, "`source_prompt` is compared with `prompt`"),
        ({"mask_prompt": " "}, "`mask_prompt` has to name"),
        ({"mask_prompt": "!!!"}, "`mask_prompt` has to name what to edit, but is '!!!'"),
        ({"mask_prompt": ["car", "boat"]}, "`mask_prompt` holds 2 entries"),
        ({"mask_prompt": "car", "mask_threshold": 1.0}, "`mask_threshold` has to be"),
        ({"mask_prompt": "car", "mask_dilation": -2}, "`mask_dilation` has to be"),
    ],
)
def test_predict_mask_names_bad_input(mask_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        mask_pipe.predict_mask(picture(), **arguments)


@pytest.mark.parametrize("several", [False, True])
def test_a_prompt_that_comes_before_the_image_is_told_the_order(mask_pipe, several):
    image, prompt = ([picture()] * 2, ["a car"] * 2) if several else (picture(), "a car")
    for run in (mask_pipe, mask_pipe.predict_mask):
        with pytest.raises(
            TypeError, match=r"`prompt` .* contains Image; the image comes first: `pipe\(image, prompt"
        ):
            run(prompt, image, mask_prompt="car")


def test_a_flow_matching_scheduler_is_refused_by_name():
    message = "`scheduler` has to be one for diffusion models.*FlowMatchEulerDiscreteScheduler.*flow matching"
    with pytest.raises(TypeError, match=message):
        make_pipe(scheduler=FlowMatchEulerDiscreteScheduler())
    pipe = make_pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match=message):
        pipe(picture(), **QUICK)


def test_latents_have_no_processing_resolution(pipe):
    with pytest.raises(ValueError, match="`image` holds latents"):
        pipe(torch.zeros(1, 4, 8, 8), processing_resolution=64, **QUICK)


def test_latents_cannot_be_searched_for_a_mask(mask_pipe):
    with pytest.raises(ValueError, match="`image` holds latents"):
        mask_pipe(torch.zeros(1, 4, 8, 8), mask_prompt="car", **QUICK)


# Regions


def test_only_the_surroundings_of_the_mask_are_edited_at_the_models_own_size(pipe):
    source, mask = picture(400, 300), box_mask(400, 300, (200, 100, 220, 112))
    shapes = set()

    def note_size(pipe, step, timestep, kwargs):
        shapes.add(tuple(kwargs["latents"].shape))
        return kwargs

    result = pipe(source, mask_image=mask, padding_mask_crop=10, callback_on_step_end=note_size, **QUICK)
    assert shapes == {(1, 4, 8, 8)}
    changed = differing(result.images[0], source)
    assert changed[np.asarray(mask) > 0].mean() > 0.9
    assert not changed[np.asarray(mask) == 0].any()
    assert np.array_equal(np.asarray(result.masks[0]), np.asarray(mask))


def test_a_region_of_the_models_size_is_edited_as_if_it_were_the_picture(pipe):
    source, mask = picture(200, 150), box_mask(200, 150, (90, 70, 113, 93))
    result = pipe(source, mask_image=mask, padding_mask_crop=20, generator=generator(), **QUICK).images[0]
    place = (70, 50, 134, 114)
    alone = pipe(source.crop(place), mask_image=mask.crop(place), generator=generator(), **QUICK).images[0]
    assert np.array_equal(np.asarray(result.crop(place)), np.asarray(alone))


def test_a_mask_that_leaves_nothing_else_is_edited_as_a_small_copy_of_the_whole(pipe):
    source, mask = picture(200, 150), box_mask(200, 150, (0, 0, 199, 149))
    arguments = {"mask_image": mask, "generator": generator()} | QUICK
    by_region = pipe(source, padding_mask_crop=32, **arguments).images[0]
    whole = pipe(source, processing_resolution=64, **(arguments | {"generator": generator()})).images[0]
    assert np.array_equal(np.asarray(by_region), np.asarray(whole))


def test_processing_resolution_sets_another_size_for_the_region(pipe):
    shapes = set()
    pipe(
        picture(400, 300),
        mask_image=box_mask(400, 300, (200, 100, 220, 112)),
        padding_mask_crop=10,
        processing_resolution=96,
        callback_on_step_end=lambda pipe, i, t, kwargs: shapes.add(tuple(kwargs["latents"].shape)) or kwargs,
        **QUICK,
    )
    assert shapes == {(1, 4, 12, 12)}


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_every_image_of_a_batch_has_a_region_of_its_own_and_the_result_it_gets_alone(pipe, output_type):
    images = [picture(300, 200, seed=0), picture(300, 200, seed=1, mode="RGBA"), picture(300, 200, seed=2)]
    # Two small things, and one too wide for a square in this picture.
    boxes = [(10, 10, 30, 30), (280, 150, 299, 199), (20, 90, 240, 100)]
    masks, batches = [box_mask(300, 200, box) for box in boxes], []

    def note_batch(pipe, step, timestep, kwargs):
        batches.append(len(kwargs["latents"]))
        return kwargs

    arguments = {"num_inference_steps": 2, "strength": 0.5, "padding_mask_crop": 12, "mask_feather": 3}
    arguments |= {"mask_dilation": 2, "output_type": output_type, "num_images_per_prompt": 2}
    together = pipe(
        images,
        ["a car", "a boat", "a tree"],
        mask_image=masks,
        generator=[generator(seed) for seed in range(6)],
        callback_on_step_end=note_batch,
        **arguments,
    )
    assert batches == [4, 2], "regions of one shape are edited in one batch"
    for index, prompt in enumerate(["a car", "a boat", "a tree"]):
        generators = [generator(2 * index), generator(2 * index + 1)]
        alone = pipe(images[index], prompt, mask_image=masks[index], generator=generators, **arguments)
        for n in range(2):
            mine, its = (
                np.asarray(each, dtype=np.float64) for each in (together.images[2 * index + n], alone.images[n])
            )
            tolerance = 1 if output_type == "pil" else 1e-4
            if output_type != "pil" and mine.shape != its.shape:
                # One picture of the batch has alpha, so all have.
                axis = 0 if output_type == "pt" else 2
                mine = np.take(mine, range(3), axis)
            np.testing.assert_allclose(mine, its, atol=tolerance)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_an_interrupt_stops_all_images_of_a_batch_whatever_the_shape_of_their_regions(pipe, output_type):
    images = [picture(300, 200, seed=0), picture(300, 200, seed=1, mode="RGBA")]
    # A region that is square, and one too wide for it, so that they are edited one after the other.
    masks, ran = [box_mask(300, 200, box) for box in ((10, 10, 30, 30), (20, 90, 240, 100))], []

    def stop(pipe, step, timestep, kwargs):
        ran.append(step)
        pipe._interrupt = True
        return kwargs

    arguments = {"padding_mask_crop": 12, "num_images_per_prompt": 2, "output_type": output_type} | QUICK
    result = pipe(images, mask_image=masks, callback_on_step_end=stop, **arguments)
    assert ran == [0]
    first, _, *others = (np.asarray(image) for image in result.images)
    scale = 1 if output_type == "pil" else 255
    assert (np.rint(scale * first)[..., :3] != np.asarray(images[0])).any(), "it is decoded as far as it has come"
    for other in others:
        assert np.array_equal(np.rint(scale * other), np.asarray(images[1]))
    assert len(result.masks) == 4
    # The next call starts afresh.
    assert differing(pipe(images[0], mask_image=masks[0], generator=generator(), **QUICK).images[0], images[0]).any()


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_a_colour_profile_that_cannot_be_used_is_said_once(mask_pipe, caplog, output_type):
    source = picture()
    source.info["icc_profile"] = b"broken"
    mask_pipe(source, mask_prompt="car", mask_threshold=0.0, output_type=output_type, **QUICK)
    assert caplog.text.count("colour profile cannot be used") == 1


def test_a_soft_mask_stays_soft_in_a_region(pipe):
    source = picture(200, 150)
    soft = Image.new("L", (200, 150), 0)
    soft.paste(Image.linear_gradient("L").resize((40, 40)), (100, 60))
    result = pipe(source, mask_image=soft, padding_mask_crop=8, generator=generator(), **QUICK)
    change = np.abs(np.asarray(result.images[0]).astype(int) - np.asarray(source)).mean(axis=2)
    assert change[61:70, 100:140].mean() < 0.5 * change[90:100, 100:140].mean()
    assert not change[np.asarray(soft) == 0].any()


def test_without_keep_background_the_decode_of_the_region_is_set_back(pipe):
    source, mask = picture(200, 150), box_mask(200, 150, (90, 70, 113, 93))
    arguments = {"mask_image": mask, "padding_mask_crop": 20, "keep_background": False, "generator": generator()}
    changed = differing(pipe(source, **arguments, **QUICK).images[0], source)
    assert changed[50:114, 70:134].mean() > 0.9
    changed[50:114, 70:134] = False
    assert not changed.any()


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (199, 149, 199, 149), (100, 70, 100, 70)])
def test_a_mask_of_one_pixel_is_edited_also_in_a_corner(pipe, box):
    source, mask = picture(200, 150), box_mask(200, 150, box)
    for padding in (0, 32):
        changed = differing(pipe(source, mask_image=mask, padding_mask_crop=padding, **QUICK).images[0], source)
        assert not changed[np.asarray(mask) == 0].any()


def test_a_picture_narrower_than_the_region_is_edited_in_its_own_aspect(pipe):
    source, mask = picture(400, 40), box_mask(400, 40, (100, 5, 140, 30))
    with pytest.raises(ValueError, match=r"`padding_mask_crop` 40 gives a region of 400x40 pixels.*64x6"):
        pipe(source, mask_image=mask, padding_mask_crop=40, **QUICK)
    result = pipe(source, mask_image=mask, padding_mask_crop=40, processing_resolution=160, **QUICK).images[0]
    assert not differing(result, source)[np.asarray(mask) == 0].any()


def test_a_photo_keeps_its_colour_profile_and_every_byte_outside(pipe):
    source, mask = picture(200, 150), box_mask(200, 150, (90, 70, 113, 93))
    source.info.update(icc_profile=icc_profiles.display_p3(), dpi=(72, 72))
    result = pipe(source, mask_image=mask, padding_mask_crop=20, **QUICK).images[0]
    assert result.info == {"icc_profile": icc_profiles.display_p3(), "dpi": (72, 72)}
    assert not differing(result, source)[np.asarray(mask) == 0].any()


def test_a_brush_layer_edits_where_it_is_painted(pipe):
    source, layer = picture(), Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    layer.paste((0, 0, 0, 255), (16, 16, 48, 48))
    expected = pipe(source, mask_image=box_mask(), generator=generator(), **QUICK)
    result = pipe(source, mask_image=layer, generator=generator(), **QUICK)
    assert np.array_equal(np.asarray(result.images[0]), np.asarray(expected.images[0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"padding_mask_crop": -1}, "`padding_mask_crop` has to be an integer of at least 0 .* -1"),
        ({"padding_mask_crop": 1.5}, "`padding_mask_crop` has to be an integer"),
        ({"padding_mask_crop": True}, "`padding_mask_crop` has to be an integer"),
        ({"padding_mask_crop": 8, "mask_image": None}, "`padding_mask_crop` .* pass `mask_image`, `mask_prompt` or"),
        ({"padding_mask_crop": 8, "output_type": "latent"}, "`padding_mask_crop` .* `output_type` asks for latents"),
        ({"padding_mask_crop": 8, "image": torch.zeros(1, 4, 8, 8)}, "`padding_mask_crop` .* `image` holds latents"),
    ],
)
def test_bad_regions_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**({"image": picture(), "mask_image": box_mask()} | QUICK | arguments))


def test_negative_embeddings_serve_one_image_or_all(pipe):
    _, negative = pipe.encode_prompt("", "cpu", 1, True, negative_prompt="grass")
    # Regions of different shapes, which are edited in two batches.
    arguments = {
        "image": [picture(96, 64, seed=seed) for seed in range(2)],
        "prompt": ["a car", "a dog"],
        "mask_image": [box_mask(96, 64, box) for box in ((8, 8, 15, 15), (0, 0, 90, 60))],
        "padding_mask_crop": 4,
        "output_type": "np",
    } | QUICK
    by_words = pipe(negative_prompt="grass", generator=[generator(0), generator(1)], **arguments).images
    for embeds in (negative, negative.repeat(2, 1, 1)):
        images = pipe(negative_prompt_embeds=embeds, generator=[generator(0), generator(1)], **arguments).images
        assert np.array_equal(images, by_words)


def test_a_region_that_is_edited_too_large_is_not_told_to_be_cut_out(pipe, caplog):
    pipe(picture(200, 150), mask_image=box_mask(200, 150), padding_mask_crop=8, processing_resolution=136, **QUICK)
    assert "The edit runs at 136x136 pixels" in caplog.text
    assert "`processing_resolution=64`" in caplog.text
    assert "padding_mask_crop" not in caplog.text
