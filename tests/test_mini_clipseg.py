"""What the mini CLIPSeg is shown and asked in training: parts of mosaics, with things cut by the border."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from diffusers_iedit import mini


@pytest.fixture(scope="module")
def training():
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[1] / "training" / "mini"))
        yield importlib.import_module("train_clipseg")


@pytest.fixture(scope="module")
def world(training):
    columns = zip(*(training_scene(seed) for seed in range(12)), strict=True)
    return training.MiniWorld(*(np.array(column) for column in columns))


def training_scene(seed):
    return importlib.import_module("common").describe(mini.render(seed, things=1 + seed % 2))


def names_of(training, example, number):
    return training.NOUN_LIST[example.nouns[number]], training.COLOUR_LIST[example.colours[number]]


def test_a_text_marks_all_that_it_names_and_nothing_where_it_names_nothing(training, world):
    words = {*training.NOUN_LIST, *training.COLOUR_LIST}
    kinds = set()
    for seed in range(60):
        example = training.draw_part(world, np.random.default_rng(seed))
        shown = set(np.unique(example.labels).tolist()) - {0}
        for text, marks in example.queries:
            # The ground's colour is not the thing's.
            asked = words & set(text.split(" on ")[0].split(" in ")[0].split(" under ")[0].split())
            named = {label for label in shown if asked <= set(names_of(training, example, label - 1))}
            assert asked
            assert named == {label for label, mark in enumerate(marks) if mark}
            kinds |= set(marks)
        sides = example.image.shape[:2]
        assert sides == example.labels.shape
        assert 64 / 1.4 - 1 <= sides[0] == sides[1] <= 64 / 0.6 + 1
    assert kinds == {-1, 0, 1}


def test_two_texts_of_a_part_name_what_it_shows_clearly_and_three_name_nothing(training, world):
    for seed in range(20):
        example = training.draw_part(world, np.random.default_rng(seed))
        assert [max(marks, default=0) for _, marks in example.queries] == [1, 1, 0, 0, 0]


def test_what_a_picture_is_enlarged_to_has_its_labels_in_place(training, world):
    example = training.draw_part(world, np.random.default_rng(1))
    labels = training.to_labels([example])[0].numpy()
    assert labels.shape == (training.MASK_SIZE, training.MASK_SIZE)
    assert set(np.unique(labels)) <= set(np.unique(example.labels))
    pixels = training.to_pixel_values([example])[0]
    assert pixels.shape == (3, *labels.shape)
    # Things are of one colour, and the mean of each is where its label says.
    for label in np.unique(labels)[1:]:
        before = example.image[example.labels == label].mean(axis=0) / 127.5 - 1
        after = pixels[:, labels == label].mean(axis=1).numpy()
        np.testing.assert_allclose(after, before, atol=0.12)
