"""Matrices of --project: what is read, and what is refused in one line."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from core.errors import UsageError
from core.projection import read_projection

MATRIX = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
MEAN = np.arange(6, dtype=np.float32)


def test_one_matrix_is_the_same_in_every_format_and_type(tmp_path):
    np.save(tmp_path / "a.npy", MATRIX)
    np.savez(tmp_path / "b.npz", matrix=MATRIX.astype(np.float64))
    save_file({"matrix": MATRIX, "mean": MEAN * 0}, tmp_path / "c.safetensors")
    read = [read_projection(str(tmp_path / name)) for name in ("a.npy", "b.npz", "c.safetensors")]
    assert all(np.array_equal(projection.matrix, MATRIX[None]) for projection in read)
    assert len({str(projection.to_json()) for projection in read}) == 1
    assert read[0].to_json()["width"] == 4


def test_other_numbers_are_another_digest(tmp_path):
    digests = set()
    others = ((MATRIX, MEAN + 1), (MATRIX * 2, MEAN), (MATRIX[None], MEAN), (MATRIX.T, MEAN[:4]))
    for matrix, mean in ((MATRIX, MEAN), *others):
        np.savez(tmp_path / "p.npz", matrix=matrix, mean=mean)
        digests.add(read_projection(str(tmp_path / "p.npz")).to_json()["digest"])
    assert len(digests) == 4  # a matrix for all layers is one that has a leading axis of 1


def test_the_same_numbers_in_another_shape_are_another_digest(tmp_path):
    digests = set()
    for matrix, mean in ((MATRIX, MEAN), (MATRIX.reshape(2, 3, 4), MEAN.reshape(2, 3))):
        np.savez(tmp_path / "p.npz", matrix=matrix, mean=mean)
        digests.add(read_projection(str(tmp_path / "p.npz")).to_json()["digest"])
    assert len(digests) == 2


def test_each_layer_may_have_its_own(tmp_path):
    matrix = np.stack([MATRIX, 2 * MATRIX])
    np.savez(tmp_path / "p.npz", matrix=matrix, mean=MEAN)
    projection = read_projection(str(tmp_path / "p.npz"))
    assert projection.out_width == 4
    np.testing.assert_array_equal(projection.mean, [MEAN, MEAN])
    projection.check("residual", 6, 2)
    with pytest.raises(UsageError, match="matrices for 2 layers, residual has 3"):
        projection.check("residual", 6, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.npz", {"matrix": MATRIX[0]}, r"matrix has shape \(4,\): expected \(D, k\) or \(layers, D, k\)"),
        ("p.npz", {"matrix": MATRIX, "mean": MEAN[:5]}, r"mean has shape \(5,\): expected \(6,\)"),
        ("p.npz", {"components": MATRIX}, "it holds components: expected matrix and, if there is one, mean"),
        ("p.npz", {"matrix": MATRIX.astype(int)}, "matrix is int64: expected floating-point numbers"),
        ("p.npz", {"matrix": MATRIX * np.inf}, "it holds NaN or infinity"),
        ("p.npz", {"matrix": np.array([[None]])}, "it cannot be read"),
        ("p.npy", b"no array", "it cannot be read"),
        ("p.safetensors", b"\x08\0\0\0\0\0\0\0not json", "it cannot be read"),
        ("p.safetensors", b"", "it cannot be read"),
        ("p.pt", b"", "expected a file that ends in .npy, .npz or .safetensors"),
        ("missing.npy", None, "there is no such file"),
    ],
)
def test_what_is_no_projection_is_refused_in_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=f"--project {path}: {message}") as refused:
        read_projection(str(path))
    assert "\n" not in str(refused.value)
