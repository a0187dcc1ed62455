"""What other tools stored becomes an output of ours, which `verify` and the reader accept."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from analysis.importing import importing
from analyze_activations import import_activations, verify
from core.base.errors import RunError, UsageError
from core.reading import open_activations
from core.shards.formats import FORMATS

LENGTHS = [4, 1, 9, 6, 3]
N_LAYERS, WIDTH = 2, 5


def requests(folder: Path, dtype=ml_dtypes.bfloat16) -> list[dict[str, np.ndarray]]:
    """What vLLM writes: a file for each request."""
    rng, made = np.random.default_rng(0), []
    folder.mkdir()
    for number, length in enumerate(LENGTHS):
        states = rng.normal(size=(length, N_LAYERS, WIDTH)).astype(dtype)
        made.append({"hidden_states": states, "token_ids": rng.integers(0, 99, length)})
        save_file(made[-1], folder / f"request-{number}.safetensors")
        (folder / f"request-{number}.safetensors.lock").touch()
    return made


@pytest.mark.parametrize("shard_format", FORMATS)
def test_requests_of_vllm_become_an_output(tmp_path, shard_format):
    dtype = ml_dtypes.bfloat16 if "bfloat16" in FORMATS[shard_format].dtypes else np.float16
    made = requests(tmp_path / "in", dtype)
    out = tmp_path / "out"
    report = import_activations(
        tmp_path / "in", "vllm", output=out, layers=[7, 15], shard_size_gb=100 / 2**30, format=shard_format
    )
    assert (report.samples, report.tokens, report.n_new) == (5, 23, 5)
    assert report.shards > 2
    assert verify(str(out)).lines()[-1] == f"verified: {report.shards} shards, 5 samples, 23 tokens"
    acts = open_activations(str(out))
    assert (acts.layers, acts.dtype) == ((7, 15), np.dtype(dtype).name)
    for sample, request in zip(acts.samples(), made, strict=True):
        assert sample.token_ids.tolist() == request["token_ids"].tolist()
        for slot, layer in enumerate((7, 15)):
            np.testing.assert_array_equal(sample.stored(layer)["activation"], request["hidden_states"][:, slot])
        assert sample.labels == {"file": f"request-{sample.sample_idx}.safetensors"}


def test_an_interrupted_import_finishes_to_the_same_bytes(tmp_path, monkeypatch):
    requests(tmp_path / "in")
    options = {"shard_size_gb": 100 / 2**30}
    import_activations(tmp_path / "in", "vllm", output=tmp_path / "whole", **options)

    def numbered(*arguments):
        for each in original(*arguments):
            if each.sample.sample_idx == 3:
                raise KeyboardInterrupt
            yield each

    original = importing._numbered
    monkeypatch.setattr(importing, "_numbered", numbered)
    with pytest.raises(KeyboardInterrupt):
        import_activations(tmp_path / "in", "vllm", output=tmp_path / "again", **options)
    monkeypatch.undo()
    report = import_activations(tmp_path / "in", "vllm", output=tmp_path / "again", **options)
    assert 0 < report.n_new < 5
    whole, again = (
        {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        for out in (tmp_path / "whole", tmp_path / "again")
    )
    assert whole == again
    assert import_activations(tmp_path / "in", "vllm", output=tmp_path / "again", **options).n_new == 0


@pytest.mark.parametrize("has_ids", [True, False])
def test_cached_activations_of_sae_lens_become_an_output(tmp_path, has_ids):
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(1)
    hook, values = "blocks.3.hook_resid_post", rng.normal(size=(11, 4, WIDTH)).astype(np.float32)
    ids = rng.integers(0, 99, (11, 4))
    features = {hook: datasets.Array2D((4, WIDTH), "float32")}
    columns = {hook: list(values)}
    if has_ids:
        features["token_ids"] = datasets.List(datasets.Value("int32"), length=4)
        columns["token_ids"] = ids.tolist()
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(str(tmp_path / "in"), num_shards=3)
    report = import_activations(tmp_path / "in", "sae_lens", output=tmp_path / "out", shard_size_gb=300 / 2**30)
    assert (report.site, report.layers, report.samples) == ("residual", (3,), 11)
    assert verify(str(tmp_path / "out")).ok
    for row, sample in enumerate(open_activations(str(tmp_path / "out")).samples()):
        np.testing.assert_array_equal(sample.stored()["activation"], values[row])
        assert sample.token_ids.tolist() == (ids[row].tolist() if has_ids else [-1] * 4)


def test_what_is_not_there_or_does_not_fit_is_refused(tmp_path):
    requests(tmp_path / "in")
    out = str(tmp_path / "out")
    for source, kind, more, said in (
        (tmp_path, "sae_lens", {}, "not cached activations of SAELens"),
        (tmp_path / "nothing", "vllm", {}, r"no \*.safetensors there"),
        (tmp_path / "in", "vllm", {"layers": [1]}, "has 2 layers: name as many"),
        (tmp_path / "in", "vllm", {"format": "npz"}, "the format npz has no bfloat16"),
        (tmp_path / "in", "csv", {}, "'csv' is no tool to import from: choose from vllm, sae_lens"),
    ):
        with pytest.raises(UsageError, match=said):
            import_activations(source, kind, output=out, **more)
    save_file({"hidden_states": np.zeros((3, 2, 5), np.float16)}, tmp_path / "in/request-9.safetensors")
    with pytest.raises(RunError, match=r"request-9.safetensors: no hidden_states and token_ids of vLLM"):
        import_activations(tmp_path / "in", "vllm", output=out)


def test_values_that_are_not_finite_or_too_large_are_refused(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    tensors = {"hidden_states": np.full((3, 2, 5), 1e6, np.float32), "token_ids": np.arange(3)}
    save_file(tensors, folder / "a.safetensors")
    with pytest.raises(RunError, match="a value does not fit float16: use --dtype float32"):
        import_activations(folder, "vllm", output=tmp_path / "out", dtype="float16")
    tensors["hidden_states"][1, 1, 1] = np.nan
    save_file(tensors, folder / "a.safetensors")
    with pytest.raises(RunError, match=r"sample 0 .*a.safetensors.*: it has NaN or infinity"):
        import_activations(folder, "vllm", output=tmp_path / "other")
