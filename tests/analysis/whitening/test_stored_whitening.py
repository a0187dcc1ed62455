"""Whitenings on disk: equal bytes, read by the safetensors package, by us and by --project."""

import numpy as np
import pytest
from safetensors import safe_open

from analysis.moments import Moments
from analysis.whitening import (
    METHODS,
    Whitening,
    WhiteningSettings,
    load_whitening,
    save_projection,
    save_whitening,
)
from core.base.errors import UsageError
from core.reduce.projection import read_projection

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 9)) @ RNG.normal(size=(9, 9)) + 40


def fitted(method: str = "pca", **settings) -> Whitening:
    return Whitening.fit(Moments.of(X), WhiteningSettings(method, **settings))


@pytest.mark.parametrize("method", METHODS)
def test_every_bit_returns_and_equal_whitenings_have_equal_bytes(method, tmp_path):
    whitening = fitted(method, shrinkage="ledoit-wolf", floor=1e-7)
    for name in ("a", "b"):
        save_whitening(fitted(method, shrinkage="ledoit-wolf", floor=1e-7), f"{tmp_path}/{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    again = load_whitening(f"{tmp_path}/a.safetensors")
    for name in ("mean", "transform", "inverse"):
        assert getattr(again, name).tobytes() == getattr(whitening, name).tobytes()
    assert again.settings == whitening.settings
    assert (again.n_samples, again.rank, again.shrinkage_amount) == (200, 9, whitening.shrinkage_amount)
    np.testing.assert_array_equal(again.apply(X), whitening.apply(X))


def test_the_safetensors_package_reads_tensors_and_metadata(tmp_path):
    whitening = fitted(n_components=4)
    save_whitening(whitening, str(tmp_path / "w.safetensors"))
    with safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"mean", "transform", "inverse"}
        np.testing.assert_array_equal(file.get_tensor("transform"), whitening.transform)
        metadata = file.metadata()
    assert metadata["method"] == "pca"
    assert (metadata["n_samples"], metadata["n_components"], metadata["kept"]) == ("200", "4", "4")
    assert load_whitening(str(tmp_path / "w.safetensors")).settings == whitening.settings


def test_a_run_whitens_what_it_stores(tmp_path):
    whitening = fitted(n_components=4)
    save_projection(whitening, str(tmp_path / "p.safetensors"))
    projection = read_projection(str(tmp_path / "p.safetensors"))
    z = (X.astype(np.float32) - projection.mean[0]) @ projection.matrix[0]
    np.testing.assert_allclose(z, whitening.apply(X), atol=2e-5)


def test_matrices_that_do_not_fit_the_mean_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_whitening(fitted(n_components=4), str(path))
    swapped = path.read_bytes().replace(b"[9,4]", b"[x,y]").replace(b"[4,9]", b"[9,4]").replace(b"[x,y]", b"[4,9]")
    path.write_bytes(swapped)
    with pytest.raises(UsageError, match=r"it is not a whitening \(mean, transform and inverse have shapes \(9,\)"):
        load_whitening(str(path))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:40],
        lambda data: b"not a file",
        lambda data: b"",
        lambda data: data[:-8],
        lambda data: data.replace(b'"method":"pca"', b'"method":"ica"'),
        lambda data: data.replace(b'"transform"', b'"transfrom"'),
        lambda data: data.replace(b'"shape":[9]', b'"shape":[3]', 1),
    ],
)
def test_another_file_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "w.safetensors"
    save_whitening(fitted(), str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=r"w\.safetensors: it is not a whitening \(.+\)$") as refused:
        load_whitening(str(path))
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match=r"none\.safetensors: there is no such file"):
        load_whitening(str(tmp_path / "none.safetensors"))
