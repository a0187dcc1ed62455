"""int8 codes of whitened rows: the stated error, and what is restored."""

import numpy as np
import pytest

from analysis.whitening import quantize_rows

Z = np.random.default_rng(0).normal(size=(300, 70)).astype(np.float32)


@pytest.mark.parametrize("block", [0, 32])
def test_a_value_is_at_most_half_a_scale_away(block):
    coded = quantize_rows(Z, block)
    restored = coded.restored()
    scales = np.repeat(coded.scale, block or Z.shape[1], axis=1)[:, : Z.shape[1]]
    assert coded.codes.dtype == np.int8
    assert (np.abs(restored - Z) <= scales * 0.5001).all()
    assert coded.nbytes == Z.size + 4 * coded.scale.size
    error = np.mean(np.linalg.norm(restored - Z, axis=1) / np.linalg.norm(Z, axis=1))
    cosines = np.sum(restored * Z, axis=1) / np.linalg.norm(restored, axis=1) / np.linalg.norm(Z, axis=1)
    assert coded.losses(Z) == pytest.approx({"relative_l2": error, "worst_cosine": cosines.min()}, rel=1e-4)
    assert error < 0.01


def test_rows_of_zeros_lose_nothing():
    coded = quantize_rows(np.zeros((3, 8), np.float32))
    assert not coded.restored().any()
    assert coded.losses(np.zeros((3, 8), np.float32)) == {}
