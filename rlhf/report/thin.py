"""Fewer points of a curve, with every peak kept: least and greatest of each bucket.

Plots of min-max buckets cover the same pixels as plots of all points as long as there are no fewer
buckets than pixel columns (Jugel et al. 2014, "M4"), and below that still reach every extreme.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PER_BUCKET = 3  # least, greatest, and one that is no number where there is one


def keep(values: NDArray[np.float64], most: int) -> NDArray[np.intp]:
    """Which of N points to keep: at most `most`, in order, the first and the last among them.

    The points are cut into buckets of equal width, ceil(N / buckets) neighbours each. Of each
    bucket the least and the greatest finite value stay, and one nan or infinity if it has any, so
    that the curve has a gap there.

    Args:
        values: [N].
        most: at least 2 + PER_BUCKET.

    Returns:
        [K] indices, K <= max(most, 2 + PER_BUCKET).
    """
    n = len(values)
    if n <= most:
        return np.arange(n)
    finite = np.isfinite(values)
    per_bucket = 2 if finite.all() else PER_BUCKET
    buckets = max(1, (most - 2) // per_bucket)
    width = -(-n // buckets)
    padding = -n % width
    shape = (-1, width)
    solid = np.pad(finite, (0, padding))
    filled = np.pad(np.where(finite, values, 0.0), (0, padding))
    starts = np.arange(len(solid) // width) * width
    low = np.where(solid, filled, np.inf).reshape(shape).argmin(axis=1) + starts
    high = np.where(solid, filled, -np.inf).reshape(shape).argmax(axis=1) + starts
    found = np.concatenate([low, high])
    found = found[solid[found]]  # not the first of a bucket that has no number at all
    if not finite.all():
        gaps = np.pad(~finite, (0, padding)).reshape(shape)
        first = gaps.argmax(axis=1) + starts
        found = np.concatenate([found, first[gaps.any(axis=1)]])
    return np.unique(np.concatenate([found, [0, n - 1]]))
