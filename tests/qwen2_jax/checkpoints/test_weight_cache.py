"""Cached weights are the checkpoint's, bit for bit, or they are not used."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging
from flax import nnx
from hf_reference import SIZES, save, tiny_model
from transformers import GPT2Config, LlamaConfig, Qwen2Config

from core.base.errors import ModelError
from qwen2_jax import load_model
from qwen2_jax.checkpoints import loading, weight_cache
from qwen2_jax.checkpoints.loading import convert_weights

ROPE = {"rope_type": "default", "rope_theta": 1e4}
MODELS = {
    "llama": LlamaConfig(**SIZES, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rope_parameters=ROPE),
    "qwen2 tied": Qwen2Config(
        **SIZES,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=48, n_layer=4, n_head=4, n_positions=64),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(save(tiny_model(MODELS["llama"]), tmp_path_factory.mktemp("llama")))


def parameters(decoder):
    flat = nnx.to_flat_state(nnx.split(decoder)[1])
    return {".".join(map(str, path)): value[...] for path, value in flat}


def assert_same(one, other):
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype
        np.testing.assert_array_equal(np.asarray(array).view(np.uint8), np.asarray(other[name]).view(np.uint8), name)


@pytest.fixture
def no_checkpoint(monkeypatch):
    """The checkpoint cannot be read any more, other than for its digest."""
    monkeypatch.setattr(loading, "open_weights", lambda files: pytest.fail("the checkpoint was read"))


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: said.append(message % args))
    return said


Q = "layers.attn.q.weight"
PARTS = [{}, {"n_layers": 2}, {"with_head": False}, {"with_head": False, "with_final_norm": False}]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_part_of_a_model_is_the_same_from_the_cache(kind, dtype, tmp_path, monkeypatch):
    model = str(save(tiny_model(MODELS[kind]), tmp_path / "model"))
    convert_weights(model, str(tmp_path / "cache"), dtype=dtype)
    from_checkpoint = [load_model(model, dtype=dtype, **part) for part in PARTS]
    monkeypatch.setattr(loading, "open_weights", lambda files: pytest.fail("the checkpoint was read"))
    for part, expected in zip(PARTS, from_checkpoint, strict=True):
        assert_same(load_model(model, dtype=dtype, weights_cache_dir=str(tmp_path / "cache"), **part), expected)


@pytest.mark.parametrize(("rows", "chunks"), [(64, (8, 8)), (97, (13, 8)), (6, (1, 6)), (62, (8, 8)), (1, (1, 1))])
def test_matrices_are_stored_in_chunks_of_rows_that_can_be_read_alone(rows, chunks, tmp_path, monkeypatch):
    """Also where the number of rows has no divisor of the right size: zeros follow then."""
    monkeypatch.setattr(weight_cache, "_CHUNK_BYTES", 8 * 5 * 4)
    values = np.random.default_rng(0).standard_normal((3, rows, 5), np.float32)
    weight_cache._save(str(tmp_path / "x"), {"layers.up": jnp.asarray(values), "embedding": jnp.asarray(values[0])})
    complete = weight_cache.CompleteCache(str(tmp_path / "x"), {"layers.up": [3, rows, 5], "embedding": [rows, 5]})
    specs = {
        "layers.up": weight_cache.ParamSpec((3, rows, 5), ("layers", "mlp", "embed")),
        "embedding": weight_cache.ParamSpec((rows, 5), ("vocab", "embed")),
    }
    stores = complete._open(specs)
    assert stores["layers.up"].shape == (3, *chunks, 5)
    assert stores["layers.up"].chunk_layout.read_chunk.shape == (1, 1, chunks[1], 5)
    assert stores["embedding"].chunk_layout.read_chunk.shape == (1, chunks[1], 5)
    for start, stop in {(0, rows), (rows // 3, rows // 2 + 1), (rows - 1, rows)}:
        part = weight_cache.CachedArray(stores["layers.up"], 1, chunks[1]).read(slice(start, stop), slice(1, 4))
        np.testing.assert_array_equal(part, values[1, start:stop, 1:4])
    for name, expected in (("layers.up", values), ("embedding", values[0])):
        found = complete.load(specs, np.dtype(np.float32), None)[name]
        np.testing.assert_array_equal(found, expected)


def test_orbax_itself_reads_the_cache(llama, tmp_path):
    converted = convert_weights(llama, str(tmp_path), dtype="float32")
    name = json.loads((Path(converted.url) / "complete.json").read_text())["name"]
    restored = ocp.PyTreeCheckpointer().restore(Path(converted.url) / name)
    expected = parameters(load_model(llama))
    np.testing.assert_array_equal(restored[Q].reshape(4, 48, 48), expected[Q])
    np.testing.assert_array_equal(restored["layers.attn_norm.weight"], expected["layers.attn_norm.weight"])


def test_a_cache_of_another_dtype_or_model_is_not_taken(llama, tmp_path, warnings):
    convert_weights(llama, str(tmp_path / "cache"), dtype="bfloat16")
    assert parameters(load_model(llama, weights_cache_dir=str(tmp_path / "cache")))[Q].dtype == jnp.float32
    other = shutil.copytree(llama, tmp_path / "other")
    config = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other / "config.json").write_text(json.dumps(config))
    assert_same(
        load_model(str(other), dtype="bfloat16", weights_cache_dir=str(tmp_path / "cache")),
        load_model(str(other), dtype="bfloat16"),
    )
    assert not warnings


def test_converting_again_writes_nothing(llama, tmp_path):
    first = convert_weights(llama, str(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = convert_weights(llama, str(tmp_path))
    assert (first.url, first.digest) == (again.url, again.digest)
    assert first.bytes > 0 == again.bytes
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def largest_file(cache):
    return max((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(cache):
    path = largest_file(cache)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_marker(cache, **edits):
    (path,) = cache.glob("*/complete.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | edits))


DAMAGE = {
    "a bit flipped": flip_a_bit,
    "a file cut": lambda cache: largest_file(cache).write_bytes(largest_file(cache).read_bytes()[:-1]),
    "a file lost": lambda cache: largest_file(cache).unlink(),
    "an unreadable marker": lambda cache: next(cache.glob("*/complete.json")).write_text("{"),
    "a marker of another kind": lambda cache: next(cache.glob("*/complete.json")).write_text("[]"),
    "an earlier format": lambda cache: edit_marker(cache, format=1),
    "a later format": lambda cache: edit_marker(cache, format=3),
    "other shapes": lambda cache: edit_marker(cache, parameters={"embedding": [1, 2]}),
    "files that nothing says anything of": lambda cache: edit_marker(cache, files={}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_cache_is_said_to_be_once_and_the_checkpoint_is_read(damage, llama, tmp_path, warnings):
    convert_weights(llama, str(tmp_path), dtype="float32")
    damage(tmp_path)
    if damage is DAMAGE["files that nothing says anything of"]:
        shutil.rmtree(largest_file(tmp_path).parent)
    assert_same(load_model(llama, weights_cache_dir=str(tmp_path)), load_model(llama))
    (said,) = warnings
    assert said.startswith("cached weights: ")
    assert str(tmp_path) in said
    assert said.endswith("; reading the checkpoint (convert_checkpoint.py writes them anew)")
    assert "\n" not in said


@pytest.mark.parametrize("damage", ["a bit flipped", "an unreadable marker"])
def test_a_damaged_cache_is_written_anew(damage, llama, tmp_path, warnings, monkeypatch):
    convert_weights(llama, str(tmp_path), dtype="float32")
    DAMAGE[damage](tmp_path)
    assert convert_weights(llama, str(tmp_path), dtype="float32").bytes
    expected = load_model(llama)
    monkeypatch.setattr(loading, "open_weights", lambda files: pytest.fail("the checkpoint was read"))
    assert_same(load_model(llama, weights_cache_dir=str(tmp_path)), expected)


def test_a_cache_of_another_layout_of_parameters_is_not_found_and_written_anew(llama, tmp_path, warnings, monkeypatch):
    """As an earlier version wrote it: of the same format, under the name it had then, with parameters of its own."""
    converted = convert_weights(llama, str(tmp_path), dtype="float32")
    edit_marker(tmp_path, parameters={"embedding": [97, 48], "layers.q": [4, 48, 48]})
    Path(converted.url).rename(tmp_path / f"{converted.digest}-float32")
    expected = load_model(llama)
    assert_same(load_model(llama, weights_cache_dir=str(tmp_path)), expected)
    assert not warnings
    assert convert_weights(llama, str(tmp_path), dtype="float32").bytes
    monkeypatch.setattr(loading, "open_weights", lambda files: pytest.fail("the checkpoint was read"))
    assert_same(load_model(llama, weights_cache_dir=str(tmp_path)), expected)
    assert not warnings


def test_the_name_of_a_cache_changes_with_the_parameters_and_the_format(monkeypatch):
    def url(specs):
        return weight_cache.WeightCache("caches", "digest", "float32", specs).url

    spec = weight_cache.ParamSpec((97, 48), ("vocab", "embed"))
    first = url({"embedding": spec})
    assert url({"embedding": spec}) == first
    assert url({"wte": spec}) != first
    assert url({"embedding": weight_cache.ParamSpec((48, 97), ("embed", "vocab"))}) != first
    monkeypatch.setattr(weight_cache, "_FORMAT", weight_cache._FORMAT + 1)
    assert url({"embedding": spec}) != first


def test_what_was_not_written_to_its_end_does_not_count(llama, tmp_path, warnings, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(weight_cache, "replace_file", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_weights(llama, str(tmp_path), dtype="float32")
    assert largest_file(tmp_path)
    assert_same(load_model(llama, weights_cache_dir=str(tmp_path)), load_model(llama))
    assert not warnings
    assert convert_weights(llama, str(tmp_path), dtype="float32").bytes


def test_no_folder_is_no_cache(llama, tmp_path, warnings):
    assert_same(load_model(llama, weights_cache_dir=str(tmp_path / "nothing")), load_model(llama))
    assert not warnings


def test_a_dtype_that_nobody_computes_in_is_refused(llama, tmp_path):
    with pytest.raises(ModelError, match="compute dtype float16 is not supported"):
        convert_weights(llama, str(tmp_path), dtype="float16")


def test_a_cache_in_a_bucket_is_read_from_there(llama, bucket, monkeypatch, warnings):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", bucket.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anybody")
    converted = convert_weights(llama, "gs://bucket/weights", dtype="float32")
    assert converted.url.startswith(f"gs://bucket/weights/{converted.digest}-float32-")
    assert converted.bytes == sum(
        len(data) for name, data in bucket.objects().items() if not name.endswith("complete.json")
    )
    expected = load_model(llama)
    monkeypatch.setattr(loading, "open_weights", lambda files: pytest.fail("the checkpoint was read"))
    assert_same(load_model(llama, weights_cache_dir="gs://bucket/weights"), expected)
    assert not warnings


def test_values_outside_the_usual_survive(tmp_path):
    """Not a number, infinities, signed zero and subnormal numbers of bfloat16."""
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(1 << 8, 1 << 8)
    weight_cache._save(str(tmp_path / "x"), {"embedding": jnp.asarray(values)})
    complete = weight_cache.CompleteCache(str(tmp_path / "x"), {"embedding": [1 << 8, 1 << 8]})
    spec = weight_cache.ParamSpec(values.shape, ("vocab", "embed"))
    found = complete.load({"embedding": spec}, np.dtype(ml_dtypes.bfloat16), None)["embedding"]
    np.testing.assert_array_equal(np.asarray(jax.device_get(found)).view(np.uint16), values.view(np.uint16))
