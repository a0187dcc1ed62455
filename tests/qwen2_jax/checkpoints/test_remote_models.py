"""Models in a bucket: the same as their copies on the disk, read in parts."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_gcs import Status
from flax import nnx
from gguf_writing import write_model as write_gguf
from hf_reference import SIZES, save, tiny_model
from tiny_run import write_model
from transformers import GPT2Config, LlamaConfig

from core.base.errors import ModelError
from qwen2_jax import load_config, load_model, load_tokenizer, model_identity, tokenizer_digest
from qwen2_jax.checkpoints import locate
from qwen2_jax.checkpoints.files import cache_folder, remote_files

ROPE = {"rope_type": "default", "rope_theta": 1e4}
LLAMA = LlamaConfig(**SIZES, hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rope_parameters=ROPE)


def upload(server, folder: Path, prefix: str = "model") -> str:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            server.state.insert("bucket", {"name": f"{prefix}/{path.relative_to(folder)}"}, path.read_bytes(), {})
    remote_files.cache_clear()
    return f"gs://bucket/{prefix}"


def parameters(decoder):
    flat = nnx.to_flat_state(nnx.split(decoder)[1])
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def assert_same(one, other):
    assert one.config == other.config
    one, other = parameters(one), parameters(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], name)


def as_safetensors(folder):
    save(tiny_model(LLAMA), folder)


def as_pieces(folder):
    tiny_model(LLAMA).save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_bin(folder):
    model = tiny_model(GPT2Config(vocab_size=97, n_embd=48, n_layer=4, n_head=4, n_positions=64))
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_bin_pieces(folder):
    model = tiny_model(LLAMA)
    model.config.save_pretrained(folder)
    names = sorted(model.state_dict())
    index = {name: f"pytorch_model-{position % 3}.bin" for position, name in enumerate(names)}
    for file in set(index.values()):
        torch.save({name: model.state_dict()[name] for name in names if index[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def as_gguf(folder):
    folder.mkdir(exist_ok=True)
    write_gguf(tiny_model(LLAMA), folder / "model.gguf")


KINDS = [as_safetensors, as_pieces, as_bin, as_bin_pieces, as_gguf]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_model_in_a_bucket_is_the_one_that_was_copied_there(kind, bucket, tmp_path):
    kind(tmp_path / "model")
    here, there = str(tmp_path / "model"), upload(bucket, tmp_path / "model")
    assert load_config(there) == load_config(here)
    assert model_identity(there) == model_identity(here)
    for dtype in ("float32", "bfloat16"):
        assert_same(load_model(there, dtype=dtype), load_model(here, dtype=dtype))


def test_a_gguf_file_may_be_named_itself(bucket, tmp_path):
    as_gguf(tmp_path / "model")
    there = upload(bucket, tmp_path / "model") + "/model.gguf"
    assert_same(load_model(there), load_model(str(tmp_path / "model")))


def test_weights_are_read_in_parts_and_not_copied_to_the_disk(bucket, tmp_path, home, monkeypatch):
    as_pieces(tmp_path / "model")
    there = upload(bucket, tmp_path / "model")
    read = {}
    real = remote_files(there)["config.json"].__class__.read

    def noting(file, start, stop):
        read.setdefault(file.name, []).append((start, stop))
        return real(file, start, stop)

    monkeypatch.setattr(remote_files(there)["config.json"].__class__, "read", noting)
    load_model(there, n_layers=1)
    of_weights = sum(stop - start for name, parts in read.items() if "safetensors" in name for start, stop in parts)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors"))
    assert of_weights < 0.6 * on_disk
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["config.json"]


def test_tokenizer_and_its_digest_are_those_of_the_copy(bucket, tmp_path):
    write_model(tmp_path / "model")
    here, there = str(tmp_path / "model"), upload(bucket, tmp_path / "model")
    text = "Hello <|end|> wörld"
    assert load_tokenizer(there).encode(text) == load_tokenizer(here).encode(text)
    assert tokenizer_digest(there) == tokenizer_digest(here)
    as_gguf(tmp_path / "gguf")
    there = upload(bucket, tmp_path / "gguf", "gguf")
    assert tokenizer_digest(there) == tokenizer_digest(str(tmp_path / "gguf"))


def test_small_files_are_fetched_once_and_again_when_they_change(bucket, tmp_path, home):
    write_model(tmp_path / "model")
    there = upload(bucket, tmp_path / "model")
    load_config(there)
    fetched = bucket.count("object.media")
    remote_files.cache_clear()
    assert load_config(there).norm_eps == 1e-6
    assert bucket.count("object.media") == fetched
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    upload(bucket, tmp_path / "model")
    assert load_config(there).norm_eps == 1e-3
    assert len(list(cache_folder("models").iterdir())) == 2


def test_a_process_keeps_to_the_files_it_first_saw(bucket, tmp_path):
    as_safetensors(tmp_path / "model")
    there = upload(bucket, tmp_path / "model")
    load_config(there)
    (found,) = (file for name, file in remote_files(there).items() if name == "model.safetensors")
    data = (tmp_path / "model/model.safetensors").read_bytes()
    bucket.state.insert("bucket", {"name": "model/model.safetensors"}, data, {})
    with pytest.raises(ModelError, match=r"model\.safetensors: .* it was replaced while it was read"):
        load_model(there)
    assert remote_files(there)["model.safetensors"] is found


def test_a_fetch_that_breaks_leaves_nothing_behind(bucket, tmp_path, home, monkeypatch):
    write_model(tmp_path / "model")
    there = upload(bucket, tmp_path / "model")
    bucket.faults.add("object.media", Status(403), times=None)
    with pytest.raises(ModelError, match=r"gs://bucket/model/config\.json: cannot be read"):
        load_config(there)
    assert not list(cache_folder("models").iterdir())
    bucket.faults.clear()
    load_config(there)


MISSING = {
    "gs://bucket/model: no config.json": lambda folder: (folder / "config.json").unlink(),
    "gs://bucket/model: no model.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "gs://bucket/model/config.json: not valid JSON": lambda folder: (folder / "config.json").write_text("{"),
    "gs://bucket/model/model.safetensors: not a whole": lambda f: (f / "model.safetensors").write_bytes(b"x" * 50),
    "no tokenizer files in gs://bucket/model": lambda folder: (folder / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize(("message", "spoil"), MISSING.items(), ids=MISSING)
def test_errors_name_the_bucket_and_not_the_copy(message, spoil, bucket, tmp_path):
    write_model(tmp_path / "model")
    spoil(tmp_path / "model")
    there = upload(bucket, tmp_path / "model")
    with pytest.raises(ModelError) as refusal:
        (load_tokenizer if "tokenizer" in message else load_model)(there)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_other_programs_get_a_local_copy_of_everything(bucket, tmp_path):
    as_safetensors(tmp_path / "model")
    there = upload(bucket, tmp_path / "model")
    copy = locate.locate_model(there, None, ("*.json", "*.safetensors"))
    for path in (tmp_path / "model").iterdir():
        assert (copy / path.name).read_bytes() == path.read_bytes()
    as_gguf(tmp_path / "gguf")
    copied = locate.locate_model(upload(bucket, tmp_path / "gguf", "gguf"), None, ("*.json",))
    assert copied.read_bytes() == (tmp_path / "gguf/model.gguf").read_bytes()


def test_a_folder_of_a_memory_file_system_will_do(tmp_path, home):
    """Any other file system of fsspec, without generations and checksums."""
    import fsspec

    as_safetensors(tmp_path / "model")
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "model").iterdir():
        memory.pipe_file(f"/models/llama/{path.name}", path.read_bytes())
    remote_files.cache_clear()
    there, here = "memory://models/llama", str(tmp_path / "model")
    assert_same(load_model(there), load_model(here))
    assert model_identity(there) == model_identity(here)
    memory.rm("/models", recursive=True)


def test_a_bin_is_the_model_that_safetensors_are(tmp_path):
    as_bin_pieces(tmp_path / "bin")
    as_safetensors(tmp_path / "safetensors")
    assert_same(load_model(str(tmp_path / "bin")), load_model(str(tmp_path / "safetensors")))
    shutil.copytree(tmp_path / "safetensors", tmp_path / "bin", dirs_exist_ok=True)
    assert locate.find_model(str(tmp_path / "bin"), None).weights[0].name == "model.safetensors"
