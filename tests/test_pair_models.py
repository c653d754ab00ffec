"""The stages of the builder that hold a model: captions, embeddings and masks, on the mini models and on tiny ones."""

import inspect
import io
import shutil

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import (
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPModel,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    CLIPTokenizer,
)

from diffusers_iedit import loading, mini
from diffusers_iedit.pairs import models
from diffusers_iedit.pairs.caption import CaptionImages, CaptionOptions, clean_caption
from diffusers_iedit.pairs.embed import EmbedImages, EmbedOptions, EmbedPrompts
from diffusers_iedit.pairs.mask import GRID, SegmentTerms, mask_iou, unfit_mask
from diffusers_iedit.pairs.options import MaskOptions


SIZES = [(64, 64), (90, 70), (70, 200), (65, 500)]


def encode(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images():
    """Encoded images of different sizes, from the mini world."""
    return [encode(mini.render(seed).image.resize(size)) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def captioner():
    return CaptionImages(CaptionOptions("mini"))


@pytest.fixture(scope="module")
def embed_images():
    return EmbedImages(EmbedOptions("mini"))


@pytest.fixture(scope="module")
def embed_prompts():
    return EmbedPrompts(EmbedOptions("mini"))


@pytest.fixture(scope="module")
def segment():
    return SegmentTerms(MaskOptions("mini"))


def opened(files):
    masks = [Image.open(io.BytesIO(file)) for file in files]
    assert {(mask.format, mask.mode) for mask in masks} == {("PNG", "L")}
    return masks


# Captions


def test_an_image_gets_the_same_caption_alone_and_in_a_batch(captioner, images):
    together = captioner({"image": images})["caption"]
    assert together == [captioner({"image": [image]})["caption"][0] for image in images]
    assert all(isinstance(caption, str) and caption for caption in together)


def test_preparing_and_predicting_is_calling(captioner, images):
    assert captioner.predict(captioner.prepare({"image": images})) == captioner({"image": images})


def test_captions_depend_on_no_random_state(captioner, images, monkeypatch):
    expected = captioner({"image": images})
    monkeypatch.setattr(captioner.model.text_decoder.generation_config, "do_sample", True)
    monkeypatch.setattr(captioner.model.text_decoder.generation_config, "temperature", 100.0)
    assert captioner({"image": images}) == expected


def test_a_caption_has_no_more_tokens_than_asked_for(images):
    captioner = CaptionImages(CaptionOptions("mini", max_new_tokens=2))
    captions = captioner({"image": images})["caption"]
    assert all(1 <= len(caption.split()) <= 2 for caption in captions)


def test_captions_are_searched_with_as_many_beams_as_asked_for(images):
    assert len(CaptionImages(CaptionOptions("mini", num_beams=3))({"image": images})["caption"]) == len(images)


@pytest.mark.parametrize(
    ("caption", "clean"),
    [
        ("arafed woman in a red dress", "woman in a red dress"),
        ("Arafed  man on a bike", "man on a bike"),
        ("there is a araffe standing on grass", "there is a standing on grass"),
        ("araffes", ""),
        ("yasser arafat giving a speech", "yasser arafat giving a speech"),
        ("a giraffe on a carafe", "a giraffe on a carafe"),
        ("  a red   car ", "a red car"),
        ("", ""),
    ],
)
def test_clean_caption_takes_out_the_words_of_blip_that_are_none(caption, clean):
    assert clean_caption(caption) == clean


@pytest.mark.parametrize("name", ["max_new_tokens", "num_beams"])
def test_caption_options_refuse_less_than_one(name):
    with pytest.raises(ValueError, match=f"`{name}` has to be at least 1, but is 0"):
        CaptionOptions(**{name: 0})


# Embeddings


def assert_unit(embeds, rows, dim):
    assert embeds.shape == (rows, dim)
    assert embeds.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(embeds.astype(np.float32), axis=1), 1, atol=1e-3)


def test_images_of_any_size_become_half_precision_vectors_of_unit_length(embed_images, images):
    assert_unit(embed_images({"image": images})["embeds"], len(images), embed_images.dim)


def test_an_image_is_embedded_alike_alone_and_in_a_batch(embed_images, images):
    alone = np.concatenate([embed_images({"image": [image]})["embeds"] for image in images])
    # Half precision steps by 2.4e-4 to 4.9e-4 there; matrices of another size are summed in another order.
    np.testing.assert_allclose(embed_images({"image": images})["embeds"], alone, atol=1e-3)


PROMPTS = ["a red car", "a blue boat on green grass", "", "汽车 \U0001f697"]


def test_prompts_become_half_precision_vectors_of_unit_length(embed_prompts):
    assert_unit(embed_prompts({"edit_prompt": PROMPTS})["embeds"], len(PROMPTS), embed_prompts.dim)


def test_a_prompt_is_embedded_alike_alone_and_in_a_batch(embed_prompts):
    alone = np.concatenate([embed_prompts({"edit_prompt": [prompt]})["embeds"] for prompt in PROMPTS])
    np.testing.assert_allclose(embed_prompts({"edit_prompt": PROMPTS})["embeds"], alone, atol=1e-3)


def test_what_clip_cannot_hold_of_a_prompt_is_cut_off(embed_prompts):
    long = "a red car " * 100
    embeds = embed_prompts({"edit_prompt": [long, long + "and a tree", "a tree"]})["embeds"]
    np.testing.assert_array_equal(embeds[0], embeds[1])
    assert not np.allclose(embeds[0], embeds[2], atol=1e-2)


def test_an_image_is_nearest_to_its_own_caption(embed_images, embed_prompts):
    scenes = [mini.render(seed) for seed in range(20)]
    image_embeds = embed_images({"image": [encode(scene.image) for scene in scenes]})["embeds"].astype(np.float32)
    captions = list(dict.fromkeys(scene.caption for scene in scenes))
    prompt_embeds = embed_prompts({"edit_prompt": captions})["embeds"].astype(np.float32)
    nearest = (image_embeds @ prompt_embeds.T).argmax(1)
    right = [captions[column] == scene.caption for column, scene in zip(nearest, scenes, strict=True)]
    assert np.mean(right) >= 0.8


# Masks


TERMS = ["red car", "boat", "a very much longer term than that", "汽车"]


def test_masks_are_png_files_as_large_as_their_images_with_0_and_255_alone(segment, images):
    outputs = segment({"image": images, "term": TERMS})
    masks = opened(outputs["mask"])
    assert [mask.size for mask in masks] == SIZES
    assert set(np.unique(np.concatenate([np.asarray(mask).ravel() for mask in masks]))) <= {0, 255}
    assert [(grid.shape, grid.dtype) for grid in outputs["grid"]] == [((GRID, GRID), np.bool_)] * len(images)


def test_a_mask_is_the_same_alone_and_in_a_batch(segment, images):
    together = segment({"image": images, "term": TERMS})
    for index, image in enumerate(images):
        alone = segment({"image": [image], "term": [TERMS[index]]})
        differing = np.asarray(opened(alone["mask"])[0]) != np.asarray(opened(together["mask"][index : index + 1])[0])
        # Pixels on the very threshold may fall to either side: matrices of another size are summed in another order.
        assert differing.mean() <= 1e-3


def test_a_mask_marks_what_the_term_names(segment):
    scenes = [mini.render(seed) for seed in range(8)]
    outputs = segment(
        {
            "image": [encode(scene.image) for scene in scenes],
            "term": [f"{scene.things[0].colour} {scene.things[0].noun}" for scene in scenes],
        }
    )
    truth = [np.asarray(scene.mask) > 0 for scene in scenes]
    found = [np.asarray(mask) > 0 for mask in opened(outputs["mask"])]
    assert np.mean([mask_iou(*pair) for pair in zip(truth, found, strict=True)]) > 0.6


def test_a_term_marks_the_same_however_it_is_written(segment):
    image = encode(mini.render(seed=22).image)
    outputs = segment({"image": [image] * 2, "term": ["red ball", "“Red Ball”!"]})
    assert outputs["grid"][0].any()
    np.testing.assert_array_equal(outputs["grid"][0], outputs["grid"][1])


def test_the_grid_is_made_of_the_mask_s_own_pixels(segment):
    scene = mini.render(3)
    outputs = segment({"image": [encode(scene.image)], "term": [scene.caption]})
    np.testing.assert_array_equal(outputs["grid"][0], np.asarray(opened(outputs["mask"])[0]) > 0)


def test_a_threshold_of_zero_marks_everything_and_one_of_almost_one_nothing(images):
    batch = {"image": images, "term": TERMS}
    full = SegmentTerms(MaskOptions("mini", mask_threshold=0.0))(batch)
    empty = SegmentTerms(MaskOptions("mini", mask_threshold=1 - 1e-12))(batch)
    assert all(np.asarray(mask).min() == 255 for mask in opened(full["mask"]))
    assert all(np.asarray(mask).max() == 0 for mask in opened(empty["mask"]))
    options = MaskOptions("mini")
    assert [unfit_mask(grid, options) for grid in full["grid"]] == ["full"] * len(images)
    assert [unfit_mask(grid, options) for grid in empty["grid"]] == ["empty"] * len(images)


def test_what_clipseg_cannot_hold_of_a_term_is_cut_off(segment, images):
    long = "red car " * 100
    outputs = segment({"image": images[:1] * 2, "term": [long, long + "and tree"]})
    assert outputs["mask"][0] == outputs["mask"][1]


def test_mask_iou_is_intersection_over_union():
    left, right, none = np.zeros((3, 4, 4), dtype=bool)
    left[:, :2], right[:, 1:3] = True, True
    assert mask_iou(left, right) == 4 / 12
    assert mask_iou(left, left) == 1
    assert mask_iou(left, none) == 0
    assert mask_iou(none, none) == 0


@pytest.mark.parametrize(
    ("pixels", "reason"), [(0, "empty"), (9, "empty"), (10, None), (50, None), (90, None), (91, "full"), (100, "full")]
)
def test_a_mask_is_unfit_beyond_the_limits_of_its_area(pixels, reason):
    grid = (np.arange(100) < pixels).reshape(10, 10)
    assert unfit_mask(grid, MaskOptions(min_mask_area=0.1, max_mask_area=0.9)) == reason


def test_an_empty_mask_is_unfit_without_any_limit():
    options = MaskOptions(min_mask_area=0, max_mask_area=1)
    assert unfit_mask(np.zeros((10, 10), dtype=bool), options) == "empty"
    assert unfit_mask(np.ones((10, 10), dtype=bool), options) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_threshold": 1.0}, "`mask_threshold` has to be a probability"),
        ({"mask_threshold": -0.1}, "`mask_threshold` has to be a probability"),
        ({"mask_threshold": float("nan")}, "`mask_threshold` has to be a probability"),
        ({"min_mask_area": 0.9}, "`min_mask_area` and `max_mask_area` have to be shares"),
        ({"max_mask_area": 1.1}, "`min_mask_area` and `max_mask_area` have to be shares"),
        ({"min_mask_area": -0.1}, "`min_mask_area` and `max_mask_area` have to be shares"),
        ({"min_mask_iou": 1.1}, "`min_mask_iou` has to lie in"),
    ],
)
def test_mask_options_that_make_no_sense_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        MaskOptions(**options)


# Loading


@pytest.fixture
def folders(tmp_path):
    """A captioner, a CLIP and a CLIPSeg in folders of their own, with their processors."""
    for part, parts in (("captioner", tiny_models.blip()), ("mask_model", tiny_models.clipseg())):
        for each in parts:
            each.save_pretrained(tmp_path / part)
    shutil.copytree(mini.clip_path(), tmp_path / "clip")
    return tmp_path


STAGES = [
    (lambda model: CaptionImages(CaptionOptions(model)), "caption_model", "captioner"),
    (lambda model: EmbedImages(EmbedOptions(model)), "clip_model", "clip"),
    (lambda model: EmbedPrompts(EmbedOptions(model)), "clip_model", "clip"),
    (lambda model: SegmentTerms(MaskOptions(model)), "mask_model", "mask_model"),
]
stages = pytest.mark.parametrize(("make", "option", "part"), STAGES, ids=["caption", "image", "prompt", "mask"])


@stages
def test_a_model_is_loaded_from_a_folder_ready_to_predict(folders, make, option, part):
    model = make(str(folders / part)).model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@stages
@pytest.mark.parametrize("name", ["/nowhere/at/all", "nowhere/at", "not a name"])
def test_a_model_that_is_not_there_is_an_error_that_names_the_option(make, option, part, name):
    with pytest.raises(ValueError, match=f"`{option}` '{name}': there is no such folder"):
        make(name)
    with pytest.raises(ValueError, match=f"`{option}` '{name}': there is no such folder"):
        models.fingerprint(name, part)


@stages
def test_weights_are_loaded_from_safetensors_only(folders, make, option, part):
    (folders / part / "model.safetensors").unlink()
    torch.save({}, folders / part / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"`{option}` .*model.safetensors"):
        make(str(folders / part))


@stages
def test_weights_that_are_cut_off_are_an_error_that_names_the_option(folders, make, option, part):
    weights = folders / part / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"`{option}` "):
        make(str(folders / part))


@stages
def test_a_model_of_another_kind_is_an_error_that_names_the_option(folders, make, option, part):
    other = "mask_model" if part == "captioner" else "captioner"
    with pytest.raises(ValueError, match=f"`{option}` "):
        make(str(folders / other))


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    model, _ = tiny_models.blip()
    weights = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in weights.items() if "vision_model" not in k})
    with pytest.raises(ValueError, match=r"`caption_model` .* of its weights are missing, for instance vision_model"):
        models.load(BlipForConditionalGeneration, str(tmp_path), "captioner")


@pytest.mark.parametrize(
    ("cls", "part", "option"),
    [
        (BlipProcessor, "captioner", "caption_model"),
        (CLIPTokenizer, "clip", "clip_model"),
        (CLIPSegProcessor, "mask_model", "mask_model"),
    ],
)
def test_a_tokenizer_without_its_files_is_an_error(folders, cls, part, option):
    for file in (folders / part).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"`{option}` .*tokenizer"):
        models.load(cls, str(folders / part), part)


def test_code_that_lies_beside_a_model_is_never_run(folders):
    config = folders / "clip" / "config.json"
    code = '{"auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"},'
    config.write_text(config.read_text().replace("{", code, 1))
    (folders / "clip" / "own.py").write_text("raise SystemExit('code was run')")
    assert isinstance(models.load(CLIPModel, str(folders / "clip"), "clip"), CLIPModel)
    assert "trust_remote_code" not in inspect.getsource(models) + inspect.getsource(loading)


@pytest.mark.parametrize(
    ("cls", "part", "folder"),
    [
        (BlipForConditionalGeneration, "captioner", mini.captioner_path()),
        (CLIPModel, "clip", mini.clip_path()),
        (CLIPSegForImageSegmentation, "mask_model", mini.mask_model_path()),
    ],
)
def test_mini_is_the_model_that_the_package_ships(cls, part, folder):
    loaded = models.load(cls, "mini", part)
    assert type(loaded) is cls
    assert loaded.name_or_path == str(folder)


def test_a_fingerprint_tells_files_apart_not_folders(folders):
    clip = folders / "clip"
    before = models.fingerprint(str(clip), "clip")
    assert before == models.fingerprint("mini", "clip")
    (clip / "README.md").write_text("no part of the model")
    assert models.fingerprint(str(clip), "clip") == before

    weights = bytearray((clip / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (clip / "model.safetensors").write_bytes(weights)
    changed = models.fingerprint(str(clip), "clip")
    assert changed != before
    (clip / "preprocessor_config.json").rename(clip / "preprocessor.json")
    assert models.fingerprint(str(clip), "clip") not in (before, changed)


FINGERPRINT = """
from diffusers_iedit.pairs import models
print(models.fingerprint("someone/clip", "clip"))
try:
    models.fingerprint("someone/else", "clip")
except ValueError as error:
    print(str(error).partition(":")[0])
"""


def test_the_fingerprint_of_a_hub_id_is_its_commit(hub):
    files = {file.name: file.read_bytes() for file in mini.clip_path().iterdir()}
    sha = hub.add("models", "someone/clip", files)
    result = hub.run(FINGERPRINT)
    assert result.stdout.splitlines() == [f"commit {sha}", "`clip_model` 'someone/else'"], result.stderr
