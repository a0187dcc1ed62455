import io
import os
import pickle
import subprocess
import sys
import textwrap
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.samples.windows import TokenizedSample
from core.shards.formats import FORMATS, ShardContent
from core.shards.formats.pickle_shard import RestrictedUnpickler


def has(fmt: str, dtype: str) -> bool:
    return dtype in FORMATS[fmt].dtypes


def content(lengths, layers=(0, 7), width=5, dtype="float16", seed=0) -> ShardContent:
    rng = np.random.default_rng(seed)
    activations = rng.normal(size=(len(layers), sum(lengths), width)).astype(DTYPES[dtype])
    samples = tuple(
        TokenizedSample(10 + i, i, 1, rng.integers(0, 9, n).astype(np.int32), n, f"préview {i}", {"label": i})
        for i, n in enumerate(lengths)
    )
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return ShardContent("residual", tuple(layers), {"activation": activations}, offsets, samples)


def selected(lengths, **kwargs) -> ShardContent:
    """Every token has a reason or not at random; only those without one are in the arrays."""
    shard = content(lengths, **kwargs)
    rng = np.random.default_rng(1)
    samples = tuple(replace(s, reasons=rng.integers(0, 2, len(s.token_ids)).astype(np.uint8)) for s in shard.samples)
    kept = np.concatenate([s.reasons == 0 for s in samples])
    offsets = np.cumsum([0, *(s.n_stored for s in samples)], dtype=np.int64)
    return replace(shard, arrays={"activation": shard.values[:, kept]}, offsets=offsets, samples=samples)


def written(fmt: str, shard: ShardContent) -> bytes:
    sink = io.BytesIO()
    FORMATS[fmt].write(shard, sink)
    return sink.getvalue()


@pytest.mark.parametrize(("fmt", "dtype"), [(fmt, dtype) for fmt in FORMATS for dtype in DTYPES if has(fmt, dtype)])
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6), n_layers=st.integers(1, 3))
def test_what_is_written_is_read_back_exactly(fmt, dtype, lengths, n_layers):
    shard = content(lengths, layers=range(n_layers), dtype=dtype)
    stored = FORMATS[fmt].read(io.BytesIO(written(fmt, shard)))
    assert stored.sample_idx == tuple(s.sample_idx for s in shard.samples)
    assert tuple(stored.layers) == shard.layers
    for slot, layer in enumerate(shard.layers):
        for i, array in enumerate(stored.layers[layer]):
            assert array.dtype == DTYPES[dtype]
            np.testing.assert_array_equal(array, shard.rows("activation", slot, i))


@pytest.mark.parametrize("fmt", list(FORMATS))
@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_selected_tokens_are_read_back_with_their_places_and_ids(fmt, lengths):
    shard = selected(lengths, layers=(-1, 3))
    stored = FORMATS[fmt].read(io.BytesIO(written(fmt, shard)))
    for i, sample in enumerate(shard.samples):
        places = [place for place, reason in enumerate(sample.reasons) if reason == 0]
        assert stored.positions[i].tolist() == places
        assert stored.positions[i].dtype == np.int32
        if stored.token_ids is not None:
            assert stored.token_ids[i].tolist() == sample.token_ids[places].tolist()
        for slot, layer in enumerate((-1, 3)):
            assert stored.layers[layer][i].shape == (len(places), 5)
            np.testing.assert_array_equal(stored.layers[layer][i], shard.rows("activation", slot, i))
    assert stored.outline() == shard.outline()
    others = replace(shard, samples=content(lengths).samples, offsets=content(lengths).offsets)
    assert stored.outline() != others.outline()


def reduced_content(pools: int) -> ShardContent:
    """Codes with their scales and places: of tokens, or of so many pools a sample."""
    rng, lengths = np.random.default_rng(3), [3, 4]
    plain = content(lengths)
    rows = pools * len(lengths) if pools else sum(lengths)
    offsets = np.arange(len(lengths) + 1) * pools if pools else plain.offsets
    return replace(
        plain,
        offsets=offsets.astype(np.int64),
        samples=tuple(replace(sample, n_pools=pools) for sample in plain.samples),
        arrays={
            "activation": rng.integers(-127, 128, (2, rows, 5)).astype(np.int8),
            "indices": rng.integers(0, 99, (2, rows, 5)).astype(np.uint16),
            "scale": rng.random((2, rows, 1)).astype(np.float32),
        },
    )


@pytest.mark.parametrize("pools", [0, 2])
@pytest.mark.parametrize(
    ("fmt", "codes"), [(fmt, codes) for fmt in FORMATS for codes in CODE_DTYPES if has(fmt, codes)]
)
def test_every_format_holds_codes_scales_and_places(fmt, pools, codes):
    shard = reduced_content(pools)
    shard = replace(shard, arrays=shard.arrays | {"activation": shard.values.astype(CODE_DTYPES[codes])})
    stored = FORMATS[fmt].read(io.BytesIO(written(fmt, shard)))
    assert stored.outline() == shard.outline()
    assert set(stored.more) == {"indices", "scale"}
    assert stored.positions is None
    if pools:
        assert stored.token_ids is None
    for slot, layer in enumerate(shard.layers):
        for sample in range(2):
            assert stored.layers[layer][sample].dtype == CODE_DTYPES[codes]
            np.testing.assert_array_equal(stored.layers[layer][sample], shard.rows("activation", slot, sample))
            for name in shard.more:
                np.testing.assert_array_equal(stored.more[name][layer][sample], shard.rows(name, slot, sample))
    other = replace(shard, arrays={name: array for name, array in shard.arrays.items() if name != "indices"})
    assert stored.outline() != other.outline()


def test_pickled_layers_that_name_different_tokens_are_refused():
    shard = pickle.loads(written("pickle", selected([4, 6])))
    shard[7][1]["token_positions"] = shard[7][1]["token_positions"] + 1
    with pytest.raises(ValueError, match="different tokens"):
        FORMATS["pickle"].read(io.BytesIO(pickle.dumps(shard)))
    del shard[7][1]["token_positions"]
    with pytest.raises(ValueError):
        FORMATS["pickle"].read(io.BytesIO(pickle.dumps(shard)))


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_equal_content_gives_equal_bytes_whatever_its_objects_are(fmt):
    one, other = content([3, 4]), content([3, 4])
    assert written(fmt, one) == written(fmt, other)


def test_pickle_needs_numpy_alone_and_has_the_described_shape(tmp_path):
    (tmp_path / "s.pkl").write_bytes(written("pickle", content([3, 4])))
    script = """
        import pickle, sys
        shard = pickle.load(open("s.pkl", "rb"))
        assert list(shard) == [0, 7]
        assert [list(item) for item in shard[7]] == [["sample_idx", "activation", "shape", "text_preview"]] * 2
        assert [item["activation"].shape for item in shard[0]] == [(3, 5), (4, 5)]
        assert [item["shape"] for item in shard[0]] == [(3, 5), (4, 5)]
        assert "core" not in sys.modules and "ml_dtypes" not in sys.modules
    """
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, env=clean, check=True)


@pytest.mark.parametrize("evil", [os.system, eval, subprocess.Popen, np.load, pickle.loads, getattr])
def test_the_reader_refuses_pickles_that_hold_anything_else(evil):
    class Evil:
        def __reduce__(self):
            return evil, ("true",)

    with pytest.raises(ValueError, match="neither an array nor a plain container"):
        FORMATS["pickle"].read(io.BytesIO(pickle.dumps({0: [Evil()]})))
    with pytest.raises(pickle.UnpicklingError):
        RestrictedUnpickler(io.BytesIO(pickle.dumps(evil))).load()


def test_the_safetensors_package_reads_every_tensor(tmp_path):
    shard = content([3, 4], dtype="bfloat16")
    (tmp_path / "s.safetensors").write_bytes(written("safetensors", shard))
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"layer_0", "layer_7", "token_ids", "sample_idx", "sample_offsets"}
        layer = file.get_tensor("layer_7")
        assert layer.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(layer, shard.values[1])
        np.testing.assert_array_equal(file.get_tensor("sample_offsets"), [0, 3, 7])
        np.testing.assert_array_equal(file.get_tensor("sample_idx"), [10, 11])
        np.testing.assert_array_equal(
            file.get_tensor("token_ids"), np.concatenate([s.token_ids for s in shard.samples])
        )
        assert file.metadata() == {"site": "residual", "layers": "[0, 7]"}
    shard = selected([3, 4])
    (tmp_path / "s.safetensors").write_bytes(written("safetensors", shard))
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {"layer_0", "layer_7", "token_ids", "positions", "sample_idx", "sample_offsets"}
        start, stop = file.get_tensor("sample_offsets")[1:3]
        np.testing.assert_array_equal(file.get_tensor("positions")[start:stop], shard.samples[1].stored_places)


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_a_shard_cut_anywhere_is_refused_with_a_reason(fmt):
    whole = written(fmt, content([3, 4]))
    for size in range(0, len(whole) - 1, 7):
        with pytest.raises(ValueError):
            FORMATS[fmt].read(io.BytesIO(whole[:size]))
