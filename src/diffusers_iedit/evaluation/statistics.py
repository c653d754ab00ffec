"""Means with bootstrap intervals, and paired differences against a baseline: the numbers of the tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.stats import bootstrap


RESAMPLES = 5_000


def interval(values) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean with its 95 % bootstrap interval, the same at every call.

    The percentile method: unlike the basic one it stays in the range of the values, so that no rate passes 1.

    Args:
        values (array of `float`): N values, or N rows of C columns, shape (N,) or (N, C), finite, N at least 1. The
            columns are resampled together.

    Returns:
        `tuple[np.ndarray, np.ndarray, np.ndarray]`: Mean, low and high, each of shape () or (C,). One value is its own
        interval.

    Raises:
        ValueError: If there are no values, or if one is not finite.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("`values` has to hold at least one number, but is empty.")
    if not np.isfinite(values).all():
        raise ValueError("`values` have to be finite, but hold NaN or infinity.")
    mean = values.mean(axis=0)
    if len(values) == 1:
        return mean, mean, mean

    def resampled_mean(rows: np.ndarray, axis: int) -> np.ndarray:
        # Counting how often each row was drawn makes one matrix product of all resamples and columns.
        first = np.arange(rows.size // len(values)).reshape(*rows.shape[:-1], 1) * len(values)
        counts = np.bincount((first + rows).ravel(), minlength=rows.size).reshape(rows.shape)
        return (counts @ values / len(values)).T

    found = bootstrap(
        (np.arange(len(values)),),
        resampled_mean,
        n_resamples=RESAMPLES,
        batch=500,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return mean, found.low, found.high


def _table_of_intervals(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) with NaN where there is no value -> mean, low and high of each column, (3, C), and how many there are."""
    found = np.full((3, table.shape[1]), np.nan)
    present = ~np.isnan(table)
    # Columns with values in the same rows share their resamples, and nearly all of them do.
    patterns, pattern_of = np.unique(present, axis=1, return_inverse=True)
    for number, rows in enumerate(patterns.T):
        if rows.any():
            columns = np.flatnonzero(pattern_of == number)
            found[:, columns] = interval(table[np.ix_(rows, columns)])
    return found, present.sum(axis=0)


def summarise(
    examples: Sequence[dict], metrics: Iterable[str], variants: Iterable[str], baseline: str | None
) -> dict[str, dict]:
    """The means of all metrics of all variants, by group of the examples, and what they differ from the baseline by.

    An example counts for a variant's metric where it has a number for it: not where the edit failed, nor where the
    metric is `None` or missing. A difference is the variant minus the baseline, taken example by example over those
    that both have a number for.

    Args:
        examples (`Sequence[dict]`): Each with `group` and `results`, which maps a variant to its metrics.
        metrics (`Iterable[str]`): The metrics' names.
        variants (`Iterable[str]`): The variants' names.
        baseline (`str`, *optional*): The variant to compare with.

    Returns:
        `dict[str, dict]`: Group -> variant -> metric -> `{"mean", "low", "high", "count", "difference"}`, where the
        difference is a dict of `mean`, `low` and `high`. Metrics without any number are left out. If there are several
        groups, the group `"all"` of all examples comes first.

    Raises:
        ValueError: If there are no examples, if the baseline is none of the variants, or if a number is not finite.
    """
    metrics, variants = list(metrics), list(variants)
    if not examples:
        raise ValueError("`examples` is empty: there is nothing to summarise.")
    if baseline is not None and baseline not in variants:
        raise ValueError(f"`baseline` has to be one of {', '.join(variants)}, but is {baseline!r}.")

    table = np.full((len(examples), len(variants), len(metrics)), np.nan)
    for row, example in enumerate(examples):
        for column, variant in enumerate(variants):
            found = example["results"].get(variant, {})
            for depth, metric in enumerate(metrics):
                if found.get(metric) is not None:
                    table[row, column, depth] = found[metric]
                    if not np.isfinite(found[metric]):
                        raise ValueError(
                            f"`{metric}` of {variant} has to be finite or None, but is {found[metric]}"
                            f" for the example {example.get('key', row)}."
                        )

    groups = np.array([example["group"] for example in examples])
    parts = {name: groups == name for name in dict.fromkeys(groups.tolist())}
    if len(parts) > 1:
        parts = {"all": np.full(len(examples), True)} | parts

    summary: dict[str, dict[str, dict[str, dict]]] = {}
    for group, rows in parts.items():
        values = table[rows].reshape(rows.sum(), -1)
        columns = [values]
        if baseline is not None:
            columns.append((table[rows] - table[rows][:, [variants.index(baseline)]]).reshape(rows.sum(), -1))
        intervals, counts = _table_of_intervals(np.concatenate(columns, axis=1))
        summary[group] = {variant: {} for variant in variants}
        for number in np.flatnonzero(counts[: values.shape[1]]):
            mean, low, high = intervals[:, number].tolist()
            entry = {"mean": mean, "low": low, "high": high, "count": int(counts[number])}
            if baseline is not None and counts[number + values.shape[1]]:
                mean, low, high = intervals[:, number + values.shape[1]].tolist()
                entry["difference"] = {"mean": mean, "low": low, "high": high}
            summary[group][variants[number // len(metrics)]][metrics[number % len(metrics)]] = entry
    return summary
