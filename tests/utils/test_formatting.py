"""Figures beside a limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradaudit.utils.formatting import numbers_beside

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(limit=FINITE, values=st.lists(FINITE, max_size=4))
def test_no_figure_that_differs_from_the_limit_looks_like_it(limit, values):
    shown, *figures = numbers_beside(limit, *values)
    for value, figure in zip(values, figures, strict=True):
        assert (shown == figure) <= (value == limit)


@given(limit=st.floats(0, 1), step=st.integers(-40, 40))
def test_neighbours_of_a_limit_do_not_look_like_it(limit, step):
    value = limit + step * 1e-17
    shown, figure = numbers_beside(limit, value)
    assert (shown == figure) == (value == limit)
    assert (float(figure) < float(shown)) == (value < limit)


def test_two_digits_where_they_suffice_and_a_dash_for_what_was_not_measured():
    assert numbers_beside(0.3, 0.31, float("nan"), None) == ["0.30", "0.31", "–", "–"]
    assert numbers_beside(0.3, 0.3) == ["0.30", "0.30"]
    assert numbers_beside(0.3, 0.3000001) == ["0.3000000", "0.3000001"]
    assert numbers_beside(None, 0.5) == ["–", "0.50"]
