"""Confidence intervals of task scores and of their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

NORMAL_95 = 1.959964
DRAWS = 2000
METHODS = (
    "accuracy: Wilson's 95 % interval over items; an item's score lies between 0 and 1, whose variance is at most a "
    "binomial's of the same mean, so the interval is at least as wide as it must be",
    f"differences and ratios: on the items (or windows) that both methods had, 95 % percentile bootstrap over them, "
    f"{DRAWS} draws, items within each task",
)


def wilson(mean: float, items: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a mean of `items` scores from 0 to 1.

    Raises:
        ValueError: no items, or a mean outside 0 to 1.
    """
    if items < 1 or not 0 <= mean <= 1:
        raise ValueError(f"wilson: expected at least one item and a mean from 0 to 1, got {items} and {mean}")
    z = NORMAL_95**2 / items
    middle, half = mean + z / 2, NORMAL_95 * math.sqrt((mean * (1 - mean) + z / 4) / items)
    return max(0.0, (middle - half) / (1 + z)), min(1.0, (middle + half) / (1 + z))


def bootstrap_means(strata: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over strata of their means; items are drawn again within each stratum.

    Args:
        strata: per task the items' values (differences between two methods, say), float [items].
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for values in strata:
        means += values[rng.integers(0, len(values), (draws, len(values)))].mean(1) / len(strata)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_ratio(
    numerators: np.ndarray, denominators: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of a ratio of sums over the same items, float [items] each."""
    chosen = np.random.default_rng(seed).integers(0, len(numerators), (draws, len(numerators)))
    low, high = np.percentile(numerators[chosen].sum(1) / denominators[chosen].sum(1), [2.5, 97.5])
    return float(low), float(high)
