"""Where to edit: difference terms, CLIPSeg masks and mask clean-up."""

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from diffusers_iedit import mini
from diffusers_iedit.masking_iedit import clean_term, difference_term, dilate, feather, segment


@pytest.mark.parametrize(
    ("caption", "other", "term"),
    [
        ("a red car on green grass", "a red boat on green grass", "car"),
        ("a red car on green grass", "a blue car on green grass", "red car"),
        ("a red car and a blue ball on green grass", "a red car and a yellow ball on green grass", "blue ball"),
        ("a blue and orange bus on white background", "a blue and orange train on white background", "bus"),
        ("a white horse eating grass", "a brown horse eating grass", "white horse"),
        ("a white building", "a red building", "white building"),
        ("a photo of a cat sitting on a bench", "a photo of a dog sitting on a bench", "cat"),
        ("a car", "an apple", "car"),
        ("A Cat.", "a dog", "Cat"),
        ("a cat", "a cat wearing a hat", "cat"),
        ("a cat wearing a hat", "a cat", "wearing hat"),
        ("a car on grass", "a red car on grass", "car"),
        ("a red car on grass", "a car on grass", "red car"),
        ("a t-shirt on a bed", "a coat on a bed", "t-shirt"),
        ("a red car and a ball", "a red boat and a cup", "car and ball"),
        ("ein rotes Haus am Meer", "ein blaues Haus am Meer", "rotes Haus am Meer"),
    ],
)
def test_the_difference_term_names_what_the_other_caption_changes(caption, other, term):
    assert difference_term(caption, other) == term


@pytest.mark.parametrize(
    ("caption", "other"), [("a cat", "a cat"), ("a cat", "the cat"), ("a cat", "A cat!"), ("", ""), ("", "a cat")]
)
def test_captions_that_name_the_same_things_have_no_difference_term(caption, other):
    assert difference_term(caption, other) == ""


@pytest.mark.parametrize(
    ("term", "clean"),
    [
        ("red ball", "red ball"),
        ("Red Ball!", "red ball"),
        ("  RED\n\tBall ", "red ball"),
        ("“red, (round) ball…”", "red round ball"),
        ("ball &amp; chain", "ball chain"),
        ("&amp;quot;ball&amp;quot;", "ball"),
        ("ﬁre", "fire"),
        ("Ｒｅｄ　ｂａｌｌ！", "red ball"),
        ("cafe\u0301", "café"),
        ("the man’s T-shirt", "the man's t-shirt"),
        ("C++ 🚗", "c++ 🚗"),
        ("हिन्दी", "हिन्दी"),
        ("!!!", ""),
        ("&nbsp; — ", ""),
    ],
)
def test_a_term_is_cleaned_as_clip_cleans_text(term, clean):
    assert clean_term(term) == clean
    assert clean_term(clean) == clean


def test_the_difference_term_reads_entities_and_composed_characters():
    assert difference_term("a red ball &amp; a cafe\u0301", "a red ball &amp; a house") == "café"


@pytest.mark.parametrize("written", ["Red Ball!", "“red ball”", "red, ball.", "RED  BALL", "&quot;red ball&quot;"])
def test_a_term_finds_the_same_however_it_is_written(written):
    model = CLIPSegForImageSegmentation.from_pretrained(mini.mask_model_path())
    processor = CLIPSegProcessor.from_pretrained(mini.model_path() / "mask_processor")
    image = mini.render(seed=22).image
    assert torch.equal(segment(model, processor, [image], [written]), segment(model, processor, [image], ["red ball"]))


def test_segment_upsamples_the_logits_before_the_sigmoid():
    model, processor = tiny_models.clipseg()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8))
    probability = segment(model, processor, [image], ["car"])
    assert probability.shape == (1, 1, 45, 70)

    inputs = processor(text=["car"], images=[image], return_tensors="pt")
    logits = model(**inputs).logits.reshape(1, 1, 32, 32)
    smooth = torch.nn.functional.interpolate(logits, size=(45, 70), mode="bilinear").sigmoid()
    torch.testing.assert_close(probability, smooth)


def test_segment_gives_each_image_of_a_batch_the_mask_it_gets_alone():
    model, processor = tiny_models.clipseg()
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    images, terms = [Image.fromarray(array) for array in noise], ["car", "a much longer term"]
    together = segment(model, processor, images, terms)
    for index in range(2):
        alone = segment(model, processor, images[index : index + 1], terms[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone)


def test_dilate_grows_by_the_radius_and_keeps_soft_values():
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, 4] = 0.5
    grown = dilate(mask, 2)
    assert (grown[..., 2:7, 2:7] == 0.5).all()
    assert grown.sum() == 25 * 0.5
    assert torch.equal(dilate(mask, 0), mask)
    assert torch.equal(dilate(mask, 2**40), mask.max().expand_as(mask))


def test_dilate_by_more_than_the_mask_is_wide_takes_no_longer_than_to_fill_it():
    mask = torch.zeros(1, 1, 9, 40)
    mask[..., 4, 0] = 1.0
    assert dilate(mask, 10**9).eq(1).all()
    assert dilate(mask, 39).eq(1).all()
    assert not dilate(mask, 38).eq(1).all()


def test_feather_ramps_inside_the_mask_only():
    mask = torch.zeros(1, 1, 1, 12)
    mask[..., 2:10] = 1
    expected = torch.tensor([0, 0, 1, 2, 3, 3, 3, 3, 2, 1, 0, 0]) / 3
    torch.testing.assert_close(feather(mask.expand(1, 1, 12, 12), 2)[0, 0, 6], expected)
    assert torch.equal(feather(mask, 0), mask)


def test_feather_does_not_take_the_image_border_for_an_edge():
    assert torch.equal(feather(torch.ones(1, 1, 8, 8), 3), torch.ones(1, 1, 8, 8))


def test_feather_keeps_thin_masks():
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, :] = 1
    assert (feather(mask, 4)[..., 4, :] > 0).all()


def test_feather_wider_than_the_mask_takes_no_longer_than_the_mask_is_deep():
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 20:40, 20:40] = 1
    assert torch.equal(feather(mask, 10**9) > 0, mask > 0)
    assert torch.equal(feather(mask, 10**20) > 0, mask > 0)
