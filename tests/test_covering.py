"""The rows that stand for a product of settings hold every pair of them."""

from covering import pairwise


def test_any_two_values_meet_and_few_rows_do():
    axes = ("abcd", (1, 2), (True, False), "xy")
    rows = pairwise(*axes)
    assert 8 <= len(rows) <= 10  # of 32; each letter meets two values of an axis
    for i, one in enumerate(axes):
        for j, other in enumerate(axes[:i]):
            assert {(row[i], row[j]) for row in rows} == {(a, b) for a in one for b in other}


def test_two_axes_are_their_product():
    assert sorted(pairwise("ab", (1, 2))) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
