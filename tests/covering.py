"""Fewer than all combinations: rows in which any two values of two axes meet at least once.

A fault that one setting has, or two of them together, is found by such rows as by the whole
product; only one that needs three at once may be missed (pairwise testing: Cohen et al. 1997,
"The AETG system", IEEE TSE 23(7)).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

Meeting = tuple[int, Any, int, Any]


def meetings(row: Sequence[Any]) -> set[Meeting]:
    """Which values of which axes meet in a row."""
    return {(i, row[i], j, row[j]) for i, j in combinations(range(len(row)), 2)}


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Greedily: the next row is the first of those in which most values meet for the first time."""
    rows = list(product(*axes))
    left: set[Meeting] = set().union(*map(meetings, rows))
    found = []
    while left:
        best = max(rows, key=lambda row: len(meetings(row) & left))
        found.append(best)
        left -= meetings(best)
    return found
