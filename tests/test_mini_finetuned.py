"""The mini models that are shipped are iEdit's, and edit better than what they were fine-tuned from."""

import sys
from pathlib import Path

import pytest
import torch

from diffusers_iedit.evaluation.statistics import interval
from diffusers_iedit.finetuning.families import load_base


sys.path.insert(0, str(Path(__file__).parents[1] / "training" / "mini"))
from measure_finetuning import BASES, SETTINGS, Examiner, held_out_pairs


@pytest.fixture(scope="module", params=BASES)
def models(request):
    """A base, and what was fine-tuned from it."""
    return load_base(request.param), load_base(BASES[request.param])


def test_base_and_fine_tuned_model_differ_in_what_was_trained_alone(models):
    base, tuned = (model.components for model in models)
    assert base["scheduler"].config == tuned["scheduler"].config
    differ = set()
    for name in [name for name, part in base.items() if isinstance(part, torch.nn.Module)]:
        before, after = (part[name].state_dict() for part in (base, tuned))
        assert before.keys() == after.keys()
        if not all(torch.equal(values, after[key]) for key, values in before.items()):
            differ.add(name)
    assert differ == {"unet" if "unet" in base else "transformer"}


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
    examine = Examiner(held_out_pairs(64, "test"), **SETTINGS)
    base, tuned = map(examine, models)
    for better in ("success", "clip_score"):
        _, low, _ = interval(tuned[better] - base[better])
        assert low > 0, better
    for kept in ("ssim_not_m", "ssim_not_m_region"):
        _, _, high = interval(tuned[kept] - base[kept])
        assert high >= 0, kept
