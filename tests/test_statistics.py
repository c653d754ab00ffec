"""Means, bootstrap intervals and paired differences."""

import math
import time

import numpy as np
import pytest
from scipy.stats import bootstrap

from diffusers_iedit.evaluation.statistics import RESAMPLES, interval, summarise


def examples(**results):
    """`variant=[one number or None an example]` -> examples with the metric "score"; the groups take turns."""
    rows = zip(*results.values(), strict=True)
    return [
        {"key": str(row), "group": ("real", "generated")[row % 2], "results": dict(zip(results, found, strict=True))}
        for row, found in enumerate(
            [{"error": "broke"} if value is None else {"score": value} for value in values] for values in rows
        )
    ]


def test_the_interval_is_scipys_percentile_bootstrap_of_the_mean():
    values = np.random.default_rng(0).exponential(size=40)
    expected = bootstrap((values,), np.mean, n_resamples=50_000, method="percentile", rng=1).confidence_interval
    mean, low, high = interval(values)
    assert mean == pytest.approx(values.mean())
    assert [low, high] == pytest.approx(list(expected), rel=0.03)


def test_an_interval_covers_the_true_mean_about_95_times_in_100():
    draws = np.random.default_rng(0).normal(loc=3, size=(60, 1_000))
    _, low, high = interval(draws)
    assert 0.92 < np.mean((low <= 3) & (high >= 3)) < 0.97


def test_columns_are_those_that_they_are_alone():
    values = np.random.default_rng(0).normal(size=(30, 3))
    together = interval(values)
    for column in range(3):
        alone = interval(values[:, column])
        assert [part[column] for part in together] == pytest.approx(alone)


def test_the_interval_of_a_rate_stays_within_0_and_1():
    _, low, high = interval([1.0] * 39 + [0.0])
    assert 0 <= low < high <= 1


def test_a_constant_is_its_own_interval():
    assert interval([0.1] * 7) == pytest.approx((0.1, 0.1, 0.1))


def test_one_value_is_its_own_interval():
    assert interval([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("values", "fault"), [([], "at least one"), ([1.0, math.nan], "finite"), ([math.inf], "finite")]
)
def test_no_values_and_values_that_are_not_finite_are_refused(values, fault):
    with pytest.raises(ValueError, match=f"`values` .*{fault}"):
        interval(values)


def test_each_group_and_all_examples_are_summarised():
    summary = summarise(examples(sdedit=[1.0, 2.0, 3.0, 6.0]), ["score"], ["sdedit"], "sdedit")
    assert list(summary) == ["all", "real", "generated"]
    assert {group: summary[group]["sdedit"]["score"]["mean"] for group in summary} == {
        "all": pytest.approx(3),
        "real": pytest.approx(2),
        "generated": pytest.approx(4),
    }
    assert [summary[group]["sdedit"]["score"]["count"] for group in summary] == [4, 2, 2]


def test_a_single_group_is_not_repeated_as_all():
    found = examples(sdedit=[1.0, 2.0])
    for example in found:
        example["group"] = "style"
    assert list(summarise(found, ["score"], ["sdedit"], None)) == ["style"]


def test_a_difference_is_paired():
    # The examples differ far more than the methods do: only pairing shows that each is a little better.
    before = np.random.default_rng(0).normal(scale=10, size=50)
    found = examples(sdedit=before.tolist(), iedit=(before + np.linspace(0.9, 1.1, 50)).tolist())
    entry = summarise(found, ["score"], ["sdedit", "iedit"], "sdedit")["all"]["iedit"]["score"]
    assert entry["difference"]["mean"] == pytest.approx(1)
    assert 0.95 < entry["difference"]["low"] < 1 < entry["difference"]["high"] < 1.05
    assert entry["low"] < 0 < entry["high"]


def test_the_baseline_differs_from_itself_by_nothing():
    entry = summarise(examples(sdedit=[1.0, 2.5]), ["score"], ["sdedit"], "sdedit")["all"]["sdedit"]["score"]
    assert entry["difference"] == {"mean": 0, "low": 0, "high": 0}


def test_a_difference_is_taken_over_the_examples_that_both_have():
    found = examples(sdedit=[1.0, None, 2.0, 2.0], iedit=[None, 9.0, 4.0, 5.0])
    entry = summarise(found, ["score"], ["sdedit", "iedit"], "sdedit")["all"]["iedit"]["score"]
    assert entry["count"] == 3
    assert entry["mean"] == pytest.approx(6)
    assert entry["difference"]["mean"] == pytest.approx(2.5)


def test_what_has_no_number_is_left_out():
    found = examples(sdedit=[None, None], iedit=[1.0, 2.0])
    found[0]["results"]["iedit"]["shift"] = None
    summary = summarise(found, ["score", "shift"], ["sdedit", "iedit", "other"], "sdedit")["all"]
    assert summary["sdedit"] == summary["other"] == {}
    assert list(summary["iedit"]) == ["score"]
    assert "difference" not in summary["iedit"]["score"]


def test_without_a_baseline_there_are_no_differences():
    entry = summarise(examples(sdedit=[1.0, 2.0]), ["score"], ["sdedit"], None)["all"]["sdedit"]["score"]
    assert set(entry) == {"mean", "low", "high", "count"}


def test_a_number_that_is_not_finite_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"`score` of iedit has to be finite or None, but is inf for the example 1\."):
        summarise(examples(iedit=[1.0, math.inf]), ["score"], ["iedit"], None)


def test_no_examples_and_an_unknown_baseline_are_refused():
    with pytest.raises(ValueError, match="`examples` is empty"):
        summarise([], ["score"], ["iedit"], None)
    with pytest.raises(ValueError, match="`baseline` has to be one of iedit, but is 'sdedit'"):
        summarise(examples(iedit=[1.0]), ["score"], ["iedit"], "sdedit")


def test_a_large_evaluation_takes_seconds_and_comes_out_the_same_twice():
    generator = np.random.default_rng(0)
    metrics, variants = [f"metric {number}" for number in range(25)], [f"variant {number}" for number in range(20)]
    found = [
        {
            "key": str(row),
            "group": ("real", "generated")[row % 2],
            # Some fail, each variant's others.
            "results": {
                variant: dict(zip(metrics, generator.normal(size=25).tolist(), strict=True))
                if generator.random() < 0.99
                else {"error": "broke"}
                for variant in variants
            },
        }
        for row in range(320)
    ]
    started = time.process_time()
    summarise(found, metrics, variants, "variant 0")
    assert time.process_time() - started < 20
    assert RESAMPLES >= 5_000
    assert summarise(found[:20], metrics, variants, "variant 0") == summarise(
        found[:20], metrics, variants, "variant 0"
    )
