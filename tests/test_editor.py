"""LocalEditor: the edit of IEditPipeline with the pipeline that the user has, which stays what it is."""

import inspect

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    DDIMInverseScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from families import FAMILIES
from PIL import Image

from diffusers_iedit import IEditMaskedScheduler, IEditPipeline, IEditPipelineOutput, LocalEditor, mini


PROMPT = "an orange car and a red cat on green grass"
SCENE = mini.render(22)  # an orange car and a red ball on green grass
FAST = {"num_inference_steps": 8, "strength": 0.7}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def editor():
    editor = LocalEditor.from_pretrained("mini")
    quiet(editor.pipe)
    return editor


@pytest.fixture(scope="module")
def iedit():
    return quiet(IEditPipeline.from_pretrained(mini.model_path()))


def tiny(cls):
    return quiet(cls(**tiny_models.sd_components()))


def tiny_sdxl():
    return quiet(StableDiffusionXLImg2ImgPipeline(**tiny_models.sdxl_components(), add_watermarker=False))


def state(pipe):
    """All that makes a pipeline what it is: its attributes, and what its configuration says."""
    return dict(vars(pipe)), dict(pipe.config), dict(pipe.scheduler.config)


def box_mask(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


def outside(image, mask):
    return np.asarray(image)[np.asarray(mask) == 0]


# What an edit is


@pytest.mark.parametrize(
    "where",
    [
        {"mask_image": SCENE.mask, "mask_dilation": 2, "mask_feather": 3},
        {"mask_prompt": "red ball"},
        {"source_prompt": SCENE.caption},
        {"mask_image": SCENE.mask, "keep_background": False},
        {"mask_image": SCENE.mask, "padding_mask_crop": 6},
        {"processing_resolution": 48},
        {},
    ],
    ids=lambda where: "-".join(where) or "everywhere",
)
@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_on_the_same_models_it_is_the_edit_of_iedit_pipeline(editor, iedit, where, output_type):
    edits = [
        model(SCENE.image, PROMPT, generator=generator(), output_type=output_type, **where, **FAST)
        for model in (editor, iedit)
    ]
    images, expected = (np.asarray(edit.images[0], dtype=np.float64) for edit in edits)
    scale = 1 if output_type == "pil" else 255
    # Of what is resized, the model sees 8 bits here.
    resized = "processing_resolution" in where or "padding_mask_crop" in where
    assert np.abs(images - expected).max() * scale <= (8 if resized else 0)
    assert (edits[0].masks is None) == (edits[1].masks is None)
    if where and "processing_resolution" not in where:
        assert np.array_equal(np.asarray(edits[0].masks[0]), np.asarray(edits[1].masks[0]))


def test_a_small_thing_in_a_large_picture_changes_and_nothing_else(editor):
    large = mini.render_large(5, 4)
    edit = editor(large.image, "a photo", mask_image=large.mask, padding_mask_crop=8, generator=generator(), **FAST)
    assert edit.images[0].size == large.image.size
    assert np.array_equal(outside(edit.images[0], large.mask), outside(large.image, large.mask))
    assert not np.array_equal(np.asarray(edit.images[0]), np.asarray(large.image))


def test_words_find_the_mask_as_in_iedit_pipeline(editor, iedit):
    asked = {"mask_prompt": "red ball", "mask_dilation": 1}
    found, expected = (model.predict_mask(SCENE.image, **asked)[0] for model in (editor, iedit))
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def test_what_a_photo_carries_is_kept(editor):
    source = SCENE.image.copy()
    source.putalpha(box_mask(source.size, (0, 0, 40, 64)))
    source.info.update(dpi=(300, 300))
    (image,) = editor(source, PROMPT, mask_image=SCENE.mask, generator=generator(), **FAST).images
    assert image.mode == "RGBA"
    assert image.info["dpi"] == (300, 300)
    assert np.array_equal(np.asarray(image)[..., 3], np.asarray(source)[..., 3])


# Batches


def test_every_image_of_a_batch_is_edited_as_alone(editor):
    others = [mini.render(seed) for seed in (22, 31)]
    images, masks = [scene.image for scene in others], [scene.mask for scene in others]
    prompts = [PROMPT, "a blue car"]
    options = {"padding_mask_crop": 8, **FAST}
    together = editor(images, prompts, mask_image=masks, generator=[generator(0), generator(1)], **options)
    for index in range(2):
        alone = editor(images[index], prompts[index], mask_image=masks[index], generator=[generator(index)], **options)
        assert np.array_equal(np.asarray(together.images[index]), np.asarray(alone.images[0]))
        assert np.array_equal(np.asarray(together.masks[index]), np.asarray(alone.masks[0]))


def test_several_results_of_an_image_are_adjacent(editor):
    scenes = [mini.render(seed) for seed in (22, 31)]
    edit = editor(
        [scene.image for scene in scenes],
        PROMPT,
        mask_image=[scene.mask for scene in scenes],
        num_images_per_prompt=2,
        generator=[generator(seed) for seed in range(4)],
        **FAST,
    )
    assert len(edit.images) == len(edit.masks) == 4
    for number, image in enumerate(edit.images):
        scene = scenes[number // 2]
        assert np.array_equal(outside(image, scene.mask), outside(scene.image, scene.mask))
    assert not np.array_equal(np.asarray(edit.images[0]), np.asarray(edit.images[1]))
    alone = editor(scenes[1].image, PROMPT, mask_image=scenes[1].mask, generator=generator(3), **FAST)
    assert np.array_equal(np.asarray(edit.images[3]), np.asarray(alone.images[0]))


def test_one_image_is_edited_towards_each_of_several_prompts(editor):
    edit = editor(SCENE.image, [PROMPT, "a blue house"], mask_image=SCENE.mask, generator=generator(), **FAST)
    assert len(edit.images) == 2


# The pipeline is the user's


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_afterwards_as_it_was(fails):
    pipe = tiny_sdxl()
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    before, seen = state(pipe), []

    def callback(pipe, step, timestep, tensors):
        seen.append(pipe.scheduler)
        if fails:
            raise KeyError("the user's own")
        return tensors

    def edit():
        mask = box_mask((64, 64), (0, 0, 32, 32))
        LocalEditor(pipe)(SCENE.image, "a cat", mask_image=mask, callback_on_step_end=callback, **FAST)

    if fails:
        with pytest.raises(KeyError, match="the user's own"):
            edit()
    else:
        edit()
    assert state(pipe) == before
    assert isinstance(seen[0], IEditMaskedScheduler)
    assert not isinstance(pipe.scheduler, IEditMaskedScheduler)


def test_a_callback_stops_the_run_and_the_images_whose_turn_did_not_come_are_as_they_were(editor):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    images = [SCENE.image, SCENE.image]
    edit = editor(images, PROMPT, mask_image=SCENE.mask, callback_on_step_end=stop, generator=generator(), **FAST)
    assert steps == [0, 1]
    assert np.array_equal(outside(edit.images[0], SCENE.mask), outside(SCENE.image, SCENE.mask))
    assert np.array_equal(np.asarray(edit.images[1]), np.asarray(SCENE.image))


def test_what_the_safety_checker_blacks_out_is_black():
    checker, feature_extractor = tiny_models.safety_checker(image_size=32, flags_everything=True)
    pipe = tiny(StableDiffusionImg2ImgPipeline)
    pipe.register_modules(safety_checker=checker, feature_extractor=feature_extractor)
    edit = LocalEditor(pipe)(SCENE.image, "a cat", mask_image=SCENE.mask, **FAST)
    assert edit.nsfw_content_detected == [True]
    assert not np.asarray(edit.images[0]).any()


# Several edits


def test_apply_edits_one_region_after_the_other():
    editor = LocalEditor(tiny_sdxl())
    boxes = [box_mask((64, 64), (0, 0, 24, 24)), box_mask((64, 64), (16, 16, 48, 40))]
    edits = [
        {"prompt": "a cat", "mask_image": boxes[0], "seed": 1, "strength": 0.9},
        {"prompt": "a dog", "mask_image": boxes[1], "seed": 2, "padding_mask_crop": 8, "processing_resolution": 64},
    ]
    for edit in edits:
        edit["num_inference_steps"] = 4
    output = editor.apply(SCENE.image, edits)
    step = SCENE.image
    for edit in edits:
        arguments = {name: value for name, value in edit.items() if name != "seed"}
        (step,) = editor(step, generator=generator(edit["seed"]), **arguments).images
    union = (np.asarray(boxes[0]) | np.asarray(boxes[1])) > 0
    assert isinstance(output, IEditPipelineOutput)
    assert np.array_equal(np.asarray(output.images[0]), np.asarray(step))
    assert np.array_equal(np.asarray(output.masks[0]) > 0, union)
    assert np.array_equal(outside(output.images[0], output.masks[0]), outside(SCENE.image, output.masks[0]))
    # Where they overlap, the order matters.
    other = editor.apply(SCENE.image, edits[::-1])
    assert not np.array_equal(np.asarray(other.images[0]), np.asarray(output.images[0]))


@pytest.mark.parametrize(
    ("edits", "error", "message"),
    [
        ([], ValueError, "`edits` is empty"),
        (["a cat"], TypeError, r"`edits\[0\]` has to be a dict, but is str"),
        ([{"prompt": "a", "num_images_per_prompt": 2}], ValueError, r"`edits\[0\]` asks for several results"),
        ([{"prompt": "a", "seed": 0, "generator": generator()}], ValueError, "both `seed` and `generator`"),
        ([{"prompt": "a", "output_type": "np"}], ValueError, r"`edits\[0\]` holds `output_type`"),
    ],
)
def test_apply_names_bad_edits(editor, edits, error, message):
    with pytest.raises(error, match=message):
        editor.apply(SCENE.image, edits)


def test_apply_takes_one_picture(editor):
    with pytest.raises(ValueError, match="`image` has to be one picture, but holds 2"):
        editor.apply([SCENE.image, SCENE.image], [{"prompt": "a"}])


# Which pipelines


@pytest.mark.parametrize(
    ("pipe", "error", "message"),
    [
        (lambda: "mini", TypeError, "`pipe` has to be a loaded pipeline of diffusers, but is str"),
        (
            lambda: StableDiffusionXLPipeline(**tiny_models.sdxl_components(), add_watermarker=False),
            ValueError,
            r"load its models as StableDiffusionXLImg2ImgPipeline: `StableDiffusionXLImg2ImgPipeline.from_pipe",
        ),
        (
            lambda: tiny(StableDiffusionInpaintPipeline),
            ValueError,
            "StableDiffusionInpaintPipeline, which has masks of its own; load its models as",
        ),
    ],
)
def test_a_pipeline_that_edits_no_pictures_is_refused_with_the_class_to_load(pipe, error, message):
    with pytest.raises(error, match=message):
        LocalEditor(pipe())


def test_iedit_pipeline_is_refused_as_it_edits_locally_by_itself(iedit):
    with pytest.raises(ValueError, match="IEditPipeline, which has masks of its own"):
        LocalEditor(iedit)


def test_a_scheduler_that_cannot_be_masked_is_an_error_when_the_editor_is_made():
    pipe = tiny(StableDiffusionImg2ImgPipeline)
    pipe.scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(TypeError, match="cannot mask DDIMInverseScheduler"):
        LocalEditor(pipe)


# Loading


def test_a_folder_of_text_to_image_models_is_loaded_for_editing(tmp_path):
    tiny(StableDiffusionPipeline).save_pretrained(tmp_path)
    editor = LocalEditor.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    assert type(editor.pipe) is StableDiffusionImg2ImgPipeline
    assert editor.mask_model is None


def test_mask_model_and_captioner_come_along_with_the_folder_of_an_iedit_pipeline(iedit, tmp_path):
    editor = LocalEditor.from_pretrained(mini.model_path(), dtype=torch.bfloat16)
    assert type(editor.mask_model) is type(iedit.mask_model)
    assert type(editor.captioner) is type(iedit.captioner)
    assert editor.dtype == torch.bfloat16
    assert LocalEditor.from_pretrained("mini", mask_model=iedit.mask_model).mask_model is iedit.mask_model


def test_a_folder_of_a_class_that_the_auto_pipeline_does_not_know_is_loaded_by_its_name(tmp_path):
    ChromaPipeline.from_pipe(FAMILIES["chroma"].pipe()).save_pretrained(tmp_path)
    assert type(LocalEditor.from_pretrained(tmp_path).pipe) is ChromaImg2ImgPipeline


@pytest.mark.parametrize(
    "class_name", ["DanceDiffusionPipeline", "WanPipeline", "LTXConditionPipeline", "KandinskyV22CombinedPipeline"]
)
def test_a_folder_of_another_kind_of_pipeline_is_refused(tmp_path, class_name):
    (tmp_path / "model_index.json").write_text(f'{{"_class_name": "{class_name}"}}')
    with pytest.raises(ValueError, match=f"`model` is a {class_name}, which edits no pictures; expected"):
        LocalEditor.from_pretrained(tmp_path)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"output_type": "latent"}, ValueError, "`output_type` has to be 'pil', 'np' or 'pt'"),
        ({"height": 64}, TypeError, "`height` cannot be passed"),
        ({"stength": 0.5}, TypeError, "`stength` is an argument of neither `LocalEditor` nor StableDiffusionImg2Img"),
        ({"padding_mask_crop": 8}, ValueError, "`padding_mask_crop` edits the surroundings of a mask"),
        ({"mask_image": SCENE.mask, "mask_prompt": "ball"}, ValueError, "Pass only one of"),
        ({"mask_image": Image.new("L", (8, 8), 255)}, ValueError, "`mask_image` has to have the image's size"),
        (
            {"mask_prompt": "blue house"},
            ValueError,
            "nothing in image 0 looks like 'blue house'",
        ),
        ({"generator": [generator()] * 3}, ValueError, "`generator` holds 3 generators for 1 results"),
        ({"prompt": 3}, TypeError, "`prompt` has to be a string"),
        # The pipeline's own errors pass through.
        ({"strength": 2.0}, ValueError, "strength"),
        ({"prompt": None}, ValueError, "Provide either `prompt` or `prompt_embeds`"),
    ],
)
def test_bad_arguments_are_named(editor, arguments, error, message):
    with pytest.raises(error, match=message):
        editor(SCENE.image, **{"prompt": PROMPT, **arguments})


def test_a_mask_by_words_needs_a_mask_model_and_the_error_says_how_to_load_one(editor):
    with pytest.raises(ValueError, match=r"`mask_prompt` needs a mask model(.|\n)*editor = LocalEditor\("):
        LocalEditor(editor.pipe)(SCENE.image, PROMPT, mask_prompt="ball")


def test_embeddings_without_the_pooled_ones_are_the_pipelines_error():
    editor = LocalEditor(tiny_sdxl())
    embeds = torch.zeros(1, 77, editor.pipe.unet.config.cross_attention_dim)
    with pytest.raises(ValueError, match="pooled_prompt_embeds"):
        editor(SCENE.image, prompt_embeds=embeds, mask_image=SCENE.mask, **FAST)


def test_nan_is_an_error_and_no_black_picture():
    pipe = tiny(StableDiffusionImg2ImgPipeline)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        LocalEditor(pipe)(SCENE.image, "a cat", mask_image=SCENE.mask, **FAST)


def test_all_arguments_of_the_edit_are_written_out():
    shared = set(inspect.signature(LocalEditor.__call__).parameters) - {"self", "pipeline_kwargs"}
    assert shared < set(inspect.signature(IEditPipeline.__call__).parameters)
