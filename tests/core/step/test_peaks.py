"""The first stored value of a step that does not fit."""

import numpy as np
import pytest

from core.step.fetching import Fetch
from core.step.peaks import UnfitRow, first_unfit_row, largest_of

FETCH = Fetch.of(None, {0: (0, slice(0, 3))}, (1, 4))  # the last place of the row is padding


def found(peak: float, unit: int) -> UnfitRow | None:
    peaks = np.ones((2, 1, 4), np.float32)
    peaks[1, 0, unit] = peak
    return first_unfit_row({"attn": np.ones_like(peaks), "residual": peaks}, FETCH, largest_of(np.dtype(np.float16)))


@pytest.mark.parametrize(("peak", "is_finite"), [(np.nan, False), (np.inf, False), (65505.0, True)])
def test_it_is_found_where_it_is_stored_and_nowhere_else(peak, is_finite):
    unfit = found(peak, 2)
    assert unfit is not None
    assert (unfit.site, unfit.slot, unfit.row, unfit.unit) == ("residual", 1, 0, 2)
    assert unfit.is_finite == is_finite
    assert found(peak, 3) is None


def test_the_largest_value_of_the_dtype_fits():
    assert found(65504.0, 2) is None
