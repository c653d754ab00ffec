"""The mini model that is shipped is iEdit's, and edits better than the Stable Diffusion it was fine-tuned from."""

import sys
from pathlib import Path

import pytest
import torch

from diffusers_iedit.evaluation.statistics import interval
from diffusers_iedit.finetuning.families import load_base


sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "mini"))
from measure_finetuning import SETTINGS, Examiner, held_out_pairs


@pytest.fixture(scope="module")
def models():
    return {name: load_base(name) for name in ("mini-base", "mini")}


def test_base_and_fine_tuned_model_differ_in_the_unet_alone(models):
    base, tuned = (models[name].components for name in ("mini-base", "mini"))
    for name in ("vae", "text_encoder"):
        for a, b in zip(base[name].parameters(), tuned[name].parameters(), strict=True):
            assert torch.equal(a, b)
    assert base["scheduler"].config == tuned["scheduler"].config
    assert not torch.equal(
        base["unet"].mid_block.resnets[0].conv1.weight, tuned["unet"].mid_block.resnets[0].conv1.weight
    )


def test_the_same_pairs_are_drawn_every_time_and_none_of_them_twice():
    pairs, again = held_out_pairs(8, "test"), held_out_pairs(8, "test")
    assert [target.caption for _, target in pairs] == [target.caption for _, target in again]
    chosen = held_out_pairs(8, "choose")
    pictures = {source.image.tobytes() for source, _ in [*pairs, *chosen]}
    assert len(pictures) == 16
    for source, target in pairs:
        assert (source.thing.noun, source.thing.colour) != (target.thing.noun, target.thing.colour)


@pytest.mark.slow
def test_without_masks_it_edits_more_often_and_keeps_the_background(models):
    examine = Examiner(held_out_pairs(200, "test"), **SETTINGS)
    base, tuned = (examine(models[name]) for name in ("mini-base", "mini"))
    for better in ("success", "clip_score"):
        _, low, _ = interval(tuned[better] - base[better])
        assert low > 0, better
    for kept in ("ssim_not_m", "ssim_not_m_region"):
        _, _, high = interval(tuned[kept] - base[kept])
        assert high >= 0, kept
