"""Matrices of --project: what is read, and what is refused in one line."""

import contextlib
import io
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from core.base.errors import UsageError
from core.reduce.projection import read_projection

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


def test_bfloat16_is_read_in_every_format(tmp_path):
    """numpy writes it as two bytes that it has no name for."""
    matrix = MATRIX.astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "a.npy", matrix)
    np.savez(tmp_path / "b.npz", matrix=matrix, mean=MEAN.astype(ml_dtypes.bfloat16))
    save_file({"matrix": matrix, "mean": MEAN.astype(ml_dtypes.bfloat16)}, tmp_path / "c.safetensors")
    for name, mean in {"a.npy": MEAN * 0, "b.npz": MEAN, "c.safetensors": MEAN}.items():
        projection = read_projection(str(tmp_path / name))
        np.testing.assert_array_equal(projection.matrix, matrix[None].astype(np.float32))
        np.testing.assert_array_equal(projection.mean, mean[None])


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


def test_one_matrix_may_have_a_mean_for_each_layer(tmp_path):
    np.savez(tmp_path / "p.npz", matrix=MATRIX, mean=np.stack([MEAN, 2 * MEAN]))
    projection = read_projection(str(tmp_path / "p.npz"))
    assert (projection.matrix.shape, projection.mean.shape) == ((1, 6, 4), (2, 6))
    projection.check("residual", 6, 2)
    with pytest.raises(UsageError, match="means for 2 layers, residual has 1"):
        projection.check("residual", 6, 1)
    np.savez(tmp_path / "p.npz", matrix=np.stack([MATRIX] * 3), mean=np.stack([MEAN, 2 * MEAN]))
    with pytest.raises(UsageError, match=r"mean has shape \(2, 6\): expected \(6,\) or \(3, 6\)"):
        read_projection(str(tmp_path / "p.npz"))


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """A .npy file, whose header may claim another shape."""
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(stream, header | {"shape": shape or array.shape})
    return stream.getvalue() + array.tobytes()


def npz(parts: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return stream.getvalue()


COMPRESSED = npz({"matrix.npy": npy(MATRIX)})
DAMAGED = COMPRESSED[:60] + b"\xff" * 40 + COMPRESSED[100:]
HUGE = npy(MATRIX, (1 << 30, 1 << 20))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.npz", {"matrix": MATRIX[0]}, r"matrix has shape \(4,\): expected \(D, k\) or \(layers, D, k\)"),
        ("p.npz", {"matrix": MATRIX, "mean": MEAN[:5]}, r"mean has shape \(5,\): expected \(6,\)"),
        ("p.npz", {"components": MATRIX}, "it holds components: expected matrix and, if there is one, mean"),
        ("p.npz", {"matrix": MATRIX.astype(int)}, "matrix is int64: expected floating-point numbers"),
        ("p.npz", {"matrix": MATRIX * np.inf}, "it holds NaN or infinity"),
        ("p.npz", {"matrix": np.array([[None]])}, "it cannot be read"),
        ("p.npz", {"matrix": MATRIX.view([("a", "<f4")])}, r"matrix is \[\('a', '<f4'\)\]: expected floating-point"),
        ("p.npz", {"matrix": MATRIX.view("V4")}, r"matrix is \|V4: expected floating-point"),
        ("p.npz", DAMAGED, "it cannot be read"),
        ("p.npz", npz({"matrix": b"words"}), "it cannot be read .matrix is no array"),
        ("p.npy", HUGE, "it cannot be read"),
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


SOUND = {
    ".npy": npy(MATRIX),
    ".npz": COMPRESSED,
    ".safetensors": save({"matrix": MATRIX, "mean": MEAN}),
}


@given(st.sampled_from(sorted(SOUND)), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=3), st.data())
def test_a_damaged_file_is_read_or_refused_in_one_line(ending, changes, data):
    content = bytearray(SOUND[ending])
    for place, byte in changes:
        content[place % len(content)] = byte
    end = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p" + ending)
        path.write_bytes(content[:end])
        with contextlib.suppress(UsageError), one_line(path):
            read_projection(str(path))


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Whatever is refused inside is refused in one line that names the file."""
    try:
        yield
    except UsageError as refused:
        if "\n" in str(refused) or not str(refused).startswith(f"--project {path}: "):
            raise AssertionError(str(refused)) from refused
        raise
