"""The planes format: other readers, blocks, threads, and files that somebody changed."""

import io
import json
import subprocess
import sys
import textwrap
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import zstandard
from doc_snippets import snippet
from test_formats import content, selected

from core.base.dtypes import DTYPES
from core.shards.formats import FORMATS, planes_shard
from core.shards.formats.planes_shard import from_planes, to_planes

PLANES = FORMATS["planes"]


@pytest.fixture
def small_blocks(monkeypatch):
    """Three tokens of the test's width in float16."""
    monkeypatch.setattr(planes_shard, "BLOCK_BYTES", 30)


def written(shard, executor=None) -> bytes:
    sink = io.BytesIO()
    PLANES.write(shard, sink, executor)
    return sink.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> io.BytesIO:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return stream


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_plane_holds_one_byte_of_every_value(dtype):
    values = np.random.default_rng(0).normal(size=257).astype(DTYPES[dtype])
    planes = to_planes(values)
    assert planes.tobytes() == values.tobytes()[:: values.itemsize] + b"".join(
        values.tobytes()[place :: values.itemsize] for place in range(1, values.itemsize)
    )
    assert from_planes(planes, values.dtype).tobytes() == values.tobytes()


def test_one_sample_is_read_with_numpy_and_zstandard_alone(small_blocks, tmp_path):
    """The reader of docs/output_format.md."""
    shard = content([4, 5, 7, 3], dtype="bfloat16")
    (tmp_path / "s.planes").write_bytes(written(shard))
    np.save(tmp_path / "wanted.npy", shard.rows("activation", 1, 2).astype(np.float32))
    reader = snippet("output_format.md", with_line="def read(").partition("\nactivation = ")[0]
    check = """
        import sys
        found = read(np.load("s.planes"), 7, 2)
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found.astype(np.float32), np.load("wanted.npy"))
        assert "core" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", reader + textwrap.dedent(check)], cwd=tmp_path, env={}, check=True)


def test_the_bytes_do_not_depend_on_threads(small_blocks):
    shard = content([3] * 20, layers=range(4))
    with ThreadPoolExecutor(3) as pool:
        data = written(shard, pool)
    assert data == written(shard)
    assert sum(name.endswith(".zst") for name in members(data)) == 4 * 20
    stored = PLANES.read(io.BytesIO(data))
    np.testing.assert_array_equal(np.concatenate(stored.layers[3]), shard.values[3])


def test_a_shard_without_any_stored_token_is_read_back():
    shard = selected([4, 6])
    samples = tuple(replace(s, reasons=np.ones(len(s.token_ids), np.uint8)) for s in shard.samples)
    empty = replace(shard, arrays={"activation": shard.values[:, :0]}, offsets=np.zeros(3, np.int64), samples=samples)
    stored = PLANES.read(io.BytesIO(written(empty)))
    assert stored.outline() == empty.outline()
    assert [array.shape for array in stored.layers[7]] == [(0, 5), (0, 5)]


def test_a_file_with_any_byte_changed_is_refused_or_reads_the_same(small_blocks):
    data = bytearray(written(selected([3, 4])))
    wanted = PLANES.read(io.BytesIO(data))
    refused = 0
    for place in range(len(data)):
        data[place] ^= 0x41
        try:
            found = PLANES.read(io.BytesIO(data))
        except ValueError:
            refused += 1
        else:
            assert found.outline() == wanted.outline()
            for layer, arrays in wanted.layers.items():
                assert [a.tobytes() for a in found.layers[layer]] == [a.tobytes() for a in arrays]
        data[place] ^= 0x41
    assert refused > len(data) / 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": 8}, "token ids for 8 tokens"),
        ({"tokens": 10**15, "block_tokens": 1}, "token ids for"),
        ({"width": 6}, "is not that of"),
        ({"block_tokens": 4}, "members are not those"),
        ({"layers": [0, 7, 8]}, "members are not those"),
        ({"layers": [0, "7"]}, "layers"),
        ({"dtype": "float64"}, "cannot be"),
        ({"dtype": "float32"}, "is not that of"),
        ({"width": 0}, "cannot be"),
        ({"width": True}, "width"),
        ({"more": 1}, "more"),
    ],
)
def test_a_header_that_does_not_describe_the_members_is_refused(small_blocks, change, reason):
    parts = members(written(content([3, 4])))
    parts["shard.json"] = json.dumps(json.loads(parts["shard.json"]) | change).encode()
    with pytest.raises(ValueError, match=reason):
        PLANES.read(zipped(parts))


def test_offsets_that_do_not_cut_the_tokens_are_refused():
    for offsets in ([0, 3, 6], [1, 3, 7], [0, 8, 7], [0, 7], []):
        parts = members(written(content([3, 4])))
        buffer = io.BytesIO()
        np.save(buffer, np.array(offsets, np.int64))
        with pytest.raises(ValueError, match="sample"):
            PLANES.read(zipped(parts | {"sample_offsets.npy": buffer.getvalue()}))


def test_what_could_grow_or_run_is_refused():
    parts = members(written(content([3, 4])))
    with pytest.raises(ValueError, match="is compressed"):
        PLANES.read(zipped(parts, zipfile.ZIP_DEFLATED))
    bomb = {"layer_0/000000.zst": zstandard.compress(bytes(50_000_000))}
    with pytest.raises(ValueError, match="is not that of 7 tokens"):
        PLANES.read(zipped(parts | bomb))
    pickled = io.BytesIO()
    np.save(pickled, np.array([print], object), allow_pickle=True)
    with pytest.raises(ValueError, match="its values are object"):
        PLANES.read(zipped(parts | {"token_ids.npy": pickled.getvalue()}))
    with pytest.raises(ValueError, match="members are not those"):
        PLANES.read(zipped(parts | {"layer_0/000001.zst": b""}))


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_what_a_survey_assumes_is_near_what_zstd_makes_of_normal_values(dtype):
    values = np.random.default_rng(0).normal(size=(2048, 256)).astype(DTYPES[dtype])
    assert PLANES.stored_bytes(values) / values.nbytes == pytest.approx(PLANES.expected_ratio[dtype], abs=0.08)
