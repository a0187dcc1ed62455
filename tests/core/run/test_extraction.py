"""The engine in one process, on a tiny model in the published format."""

import gzip
import json
import pickle
import re
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import N_LAYERS, arc_lines, cache_dir, committed_files, token_lines, write_jsonl, write_model

from analysis.verification.verify import verify
from core.activation_storage import ActivationStorage
from core.base.errors import RunError, UsageError
from core.pricing.plan import price_run
from core.run.config import RunConfig
from core.run.extraction import WINDOWS_IN_MEMORY
from core.run.runner import run
from core.shards.formats import FORMATS, read_shard, require_format
from core.shards.window_activations import WindowActivations

SITES = (
    *("embedding", "resid_pre", "q", "k", "v", "attn_heads", "attn"),
    *("resid_mid", "mlp_act", "mlp", "residual", "final_norm"),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model, tmp_path) -> RunConfig:
    """40 ragged samples in about 8 windows."""
    stream = write_jsonl(tmp_path / "stream.jsonl", token_lines(40))
    return RunConfig(
        model_path=str(model),
        dataset_path=str(stream),
        output_dir=str(tmp_path / "out"),
        checkpoint_dir=str(tmp_path / "checkpoints"),
        compilation_cache_dir=cache_dir(),
        shard_size_gb=100_000 / 2**30,
        max_seq_length=256,
    )


def shard_arrays(folder: Path, pattern: str = "shard_*.pkl.gz") -> dict[tuple[int, int], np.ndarray]:
    """(layer, sample_idx) -> activation, read with gzip and pickle alone; a sample twice is an error."""
    arrays: dict[tuple[int, int], np.ndarray] = {}
    for path in sorted(folder.glob(pattern)):
        for layer, items in pickle.loads(gzip.decompress(path.read_bytes())).items():
            for item in items:
                key = (layer, item["sample_idx"])
                assert key not in arrays
                arrays[key] = item["activation"]
    return arrays


def transformers_sites(model: Path, token_ids: list[int]) -> dict[str, list[np.ndarray]]:
    """Each site of every layer for one sample alone, from hooks on transformers in float32."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    seen: dict[str, list[np.ndarray]] = {site: [] for site in SITES}

    def output(module, site):
        module.register_forward_hook(
            lambda _, args, out: seen[site].append((out[0] if isinstance(out, tuple) else out)[0].numpy())
        )

    def input_(module, site):
        module.register_forward_pre_hook(lambda _, args: seen[site].append(args[0][0].numpy()))

    output(reference.model.embed_tokens, "embedding")
    output(reference.model.norm, "final_norm")
    for layer in reference.model.layers:
        input_(layer, "resid_pre")
        input_(layer.post_attention_layernorm, "resid_mid")
        input_(layer.self_attn.o_proj, "attn_heads")
        input_(layer.mlp.down_proj, "mlp_act")
        for module, site in ((layer, "residual"), (layer.self_attn, "attn"), (layer.mlp, "mlp")):
            output(module, site)
        for site in ("q", "k", "v"):
            output(getattr(layer.self_attn, f"{site}_proj"), site)
    with torch.no_grad():
        reference(torch.tensor([token_ids]))
    return seen


@pytest.mark.parametrize("pack", [True, False])
def test_stored_activations_are_those_of_transformers_sample_by_sample(config, tmp_path, pack):
    lines = token_lines(11, seed=3)
    write_jsonl(tmp_path / "stream.jsonl", lines)
    run(replace(config, dtype="float32", activation_type=SITES, pack=pack))
    expected = {i: transformers_sites(Path(config.model_path), lines[i]["input_ids"]) for i in (0, 3, 10)}
    once = {"embedding": [-1], "final_norm": [N_LAYERS]}
    for site in SITES:
        arrays = shard_arrays(tmp_path / "out" / "tpu_0" / site)
        layers = once.get(site, list(range(N_LAYERS)))
        assert arrays.keys() == {(layer, i) for layer in layers for i in range(len(lines))}
        for i, sites in expected.items():
            for layer, reference in zip(layers, sites[site], strict=True):
                assert arrays[layer, i].shape == reference.shape
                error = np.abs(arrays[layer, i] - reference).max() / np.abs(reference).max()
                assert error <= 1e-5, (site, layer, i)


def test_each_site_has_its_layers_and_width_in_record_index_and_shards(config, tmp_path):
    run(replace(config, activation_type=("final_norm", "mlp_act", "embedding", "k"), layers_to_extract=(0, 2)))
    folder = tmp_path / "out/tpu_0"
    expected = {"embedding": ([-1], 32), "k": ([0, 2], 16), "mlp_act": ([0, 2], 64), "final_norm": ([N_LAYERS], 32)}
    for path in folder.glob("shard_*.json"):
        sites = json.loads(path.read_text())["sites"]
        assert sites == {site: {"layers": layers, "width": width} for site, (layers, width) in expected.items()}
    metadata = json.loads((folder / "metadata.json").read_text())
    assert {(s["site"], *s["layers"], s["width"]) for s in metadata["shards"]} == {
        (site, *layers, width) for site, (layers, width) in expected.items()
    }
    assert metadata["total_activations"] == 40 * 6
    for site, (layers, width) in expected.items():
        arrays = shard_arrays(folder / site)
        assert {layer for layer, _ in arrays} == set(layers)
        assert {array.shape[1] for array in arrays.values()} == {width}
    assert verify(str(tmp_path / "out")).ok


def test_a_window_ends_by_its_largest_file(config, tmp_path):
    wide = replace(config, activation_type=("k", "mlp_act"), layers_to_extract=(0,), shard_size_gb=20_000 / 2**30)
    run(wide)
    for path in (tmp_path / "out/tpu_0").glob("shard_*.json"):
        record = json.loads(path.read_text())
        stored = record["n_tokens"] * 64 * 2
        assert stored < 20_000 + 200 * 64 * 2
        assert record["next_place"] is None or stored >= 20_000


@pytest.mark.parametrize("site", ["embedding", "blocks.0.hook_resid_pre"])
def test_no_more_is_loaded_than_what_is_captured_needs(config, tmp_path, site, monkeypatch):
    loaded = []
    from core import jax_utils

    def loading(*args, **kwargs):
        loaded.append((kwargs["n_layers"], kwargs["with_final_norm"], kwargs["with_head"]))
        return load_model(*args, **kwargs)

    load_model = jax_utils.load_model
    monkeypatch.setattr(jax_utils, "load_model", loading)
    run(replace(config, activation_type=(site,), dtype="float32"))
    assert loaded == [(1, False, False)]
    from safetensors.numpy import load_file

    table = load_file(Path(config.model_path) / "model.safetensors")["model.embed_tokens.weight"]
    lines = [json.loads(line) for line in (tmp_path / "stream.jsonl").read_text().splitlines()]
    for (_, i), array in shard_arrays(tmp_path / "out/tpu_0").items():
        np.testing.assert_array_equal(array, table[lines[i]["input_ids"]])


def test_a_site_that_the_model_lacks_is_refused_with_those_it_has(config, tmp_path):
    with pytest.raises(UsageError, match=r"--activation_type attn_proj: this model has no such site: it has embedding"):
        run(replace(config, activation_type=("attn_proj",)))
    assert not (tmp_path / "out").exists()


def test_names_of_other_libraries_are_the_same_run_and_stored_under_ours(config, tmp_path):
    run(replace(config, activation_type=("mlp", "residual"), layers_to_extract=(1,)))
    names = ("blocks.1.hook_resid_post", "model.layers.1.mlp")
    assert run(replace(config, activation_type=names)).samples == 0
    assert {path.name for path in (tmp_path / "out/tpu_0").iterdir() if path.is_dir()} == {"mlp", "residual"}


def test_every_sample_is_stored_once_without_padding_and_with_all_its_layers(config, tmp_path):
    summary = run(config)
    lines = [json.loads(line) for line in (tmp_path / "stream.jsonl").read_text().splitlines()]
    arrays = shard_arrays(tmp_path / "out" / "tpu_0")
    assert set(arrays) == {(layer, i) for layer in range(N_LAYERS) for i in range(40)}
    assert all(array.shape == (len(lines[i]["input_ids"]), 32) for (_, i), array in arrays.items())
    assert all(array.dtype == np.float16 for array in arrays.values())
    assert summary.samples == 40
    assert summary.shards > 4
    assert summary.status == "complete"


def test_the_sample_table_keeps_token_ids_lengths_and_labels(config, tmp_path):
    lines = [{"input_ids": list(range(300)), "split": "a", "score": 0.5}, {"input_ids": [1, 2], "split": "b"}]
    write_jsonl(tmp_path / "stream.jsonl", lines)
    assert run(config).truncated == 1
    table = gzip.decompress((tmp_path / "out/tpu_0/samples_0001.jsonl.gz").read_bytes()).decode().splitlines()
    first, second = map(json.loads, table)
    assert first["token_ids"] == list(range(256))
    assert (first["n_tokens"], first["full_length"], first["labels"]) == (256, 300, {"split": "a", "score": 0.5})
    assert (second["token_ids"], second["labels"]) == ([1, 2], {"split": "b"})


def test_a_crash_before_any_commit_leaves_the_bytes_of_an_undisturbed_run_after_resume(config, tmp_path, monkeypatch):
    run(replace(config, output_dir=str(tmp_path / "calm")))
    calm = committed_files(tmp_path / "calm")
    commit = ActivationStorage.commit
    n_windows = sum(name.startswith("tpu_0/shard_") and name.endswith(".json") for name in calm)

    def dies_at(window):
        def dying(self, record):
            if record.window == window:
                raise RunError("killed here")
            return commit(self, record)

        return dying

    for window in range(1, n_windows + 1):
        monkeypatch.setattr(ActivationStorage, "commit", dies_at(window))
        with pytest.raises(RunError, match="killed here"):
            run(config)
    monkeypatch.undo()
    assert run(config).shards == 1
    assert committed_files(tmp_path / "out") == calm


def test_a_run_that_is_complete_does_nothing_more(config, tmp_path):
    run(config)
    before = committed_files(tmp_path / "out")
    summary = run(config)
    assert (summary.samples, summary.total_samples, summary.status) == (0, 40, "complete")
    assert committed_files(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"layers_to_extract": (1,)}, "layers"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"activation_type": ("mlp",)}, "sites"),
        ({"max_seq_length": 128}, "max_seq_length"),
        ({"random_seed": 1}, "prompts.random_seed"),
        ({"prompt_version": "output-from-examples-v1"}, "prompts.prompt_version"),
        ({"shard_size_gb": 1.0}, "shard_bytes"),
        ({"format": "safetensors"}, "format"),
        ({"max_tasks": 3}, "max_tasks"),
        ({"total_machines": 2}, "total_machines"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused_by_name_and_nothing_is_written(config, tmp_path, change, named):
    run(config)
    before = committed_files(tmp_path / "out")
    with pytest.raises(UsageError, match=rf"belongs to another run \(.*{named}"):
        run(replace(config, **change))
    assert committed_files(tmp_path / "out") == before


def test_another_model_or_stream_in_the_same_folder_is_refused(config, tmp_path):
    run(config)
    with pytest.raises(UsageError, match=r"model\.digest"):
        run(replace(config, model_path=str(write_model(tmp_path / "other", seed=1))))
    with pytest.raises(UsageError, match="identity"):
        run(replace(config, dataset_path=str(write_jsonl(tmp_path / "other.jsonl", token_lines(40, seed=9)))))


def test_a_moved_model_and_stream_are_still_the_same_run(config, tmp_path):
    run(config)
    moved = write_model(tmp_path / "moved")
    stream = tmp_path / "elsewhere" / "stream.jsonl"
    stream.parent.mkdir()
    stream.write_bytes((tmp_path / "stream.jsonl").read_bytes())
    assert run(replace(config, model_path=str(moved), dataset_path=str(stream))).total_samples == 40


def test_float16_overflow_is_refused_on_the_first_window_naming_sample_layer_and_remedy(config, tmp_path):
    huge = replace(config, model_path=str(write_model(tmp_path / "huge", scale=1e6)))
    with pytest.raises(RunError, match=r"sample_idx \d+, residual after layer 0: magnitude .* --dtype bfloat16"):
        run(huge)
    assert committed_files(tmp_path / "out") == {}
    assert run(replace(huge, dtype="bfloat16")).samples == 40


def test_nan_weights_are_reported_not_stored(config, tmp_path):
    with pytest.raises(RunError, match="NaN or infinity"):
        run(replace(config, model_path=str(write_model(tmp_path / "nan", scale=float("nan"))), dtype="float32"))


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> Path:
    """A model whose embedding of token 319 is NaN."""
    path = write_model(tmp_path_factory.mktemp("broken"))
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][319] = np.nan
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("sites", "pack", "error"),
    [
        (("residual", "embedding"), True, "sample_idx 17, embedding: the model computes NaN or infinity at token 3"),
        (("residual",), False, "sample_idx 17, residual after layer 0: the model computes NaN or infinity first at"),
        (("residual",), True, "one of sample_idx "),
    ],
)
def test_a_nan_names_its_own_sample_or_those_that_share_its_row(config, broken, tmp_path, sites, pack, error):
    lines = [{"input_ids": [token % 319 for token in line["input_ids"][:20]]} for line in token_lines(40)]
    lines[17]["input_ids"][3] = 319
    stream = write_jsonl(tmp_path / "broken.jsonl", lines)
    bad = replace(config, model_path=str(broken), dataset_path=str(stream), activation_type=sites, pack=pack)
    with pytest.raises(RunError) as raised:
        run(replace(bad, layers_to_extract=(0, 1), dtype="float32"))
    assert error in str(raised.value)
    if "one of" in error:
        listed = re.search(
            r"one of sample_idx ([0-9, ]+), which share a row, residual after layer 0", str(raised.value)
        )
        assert 17 in (samples := list(map(int, listed[1].split(", "))))
        assert 1 < len(samples) < 40
        assert "--no_pack" in str(raised.value)


@pytest.mark.parametrize("format_name", [name for name in FORMATS if name != "pickle"])
def test_shards_of_other_formats_hold_the_same_activations_as_pickle_ones(config, tmp_path, format_name):
    dtype = "bfloat16" if "bfloat16" in FORMATS[format_name].dtypes else "float16"
    run(replace(config, dtype=dtype))
    run(replace(config, dtype=dtype, format=format_name, output_dir=str(tmp_path / "st")))
    arrays = shard_arrays(tmp_path / "out" / "tpu_0")
    seen = 0
    for path in sorted((tmp_path / "st" / "tpu_0").glob(f"shard_*{FORMATS[format_name].suffix}*")):
        with path.open("rb") as stream:
            stored = read_shard(stream, format_name, gzipped=path.suffix == ".gz")
        for layer, items in stored.layers.items():
            for index, array in zip(stored.sample_idx, items, strict=True):
                np.testing.assert_array_equal(array, arrays[layer, index])
                seen += 1
    assert seen == len(arrays)


@pytest.mark.parametrize("format_name", ["npz", "parquet", "arrow"])
def test_lost_records_and_files_are_made_again_to_the_same_bytes(config, tmp_path, format_name):
    wanted = replace(config, format=format_name, activation_type=("residual", "mlp"))
    run(wanted)
    before = committed_files(tmp_path / "out")
    records = sorted((tmp_path / "out/tpu_0").glob("shard_*.json"))
    assert len(records) > 3
    for record in records[1:]:
        record.unlink()
    (tmp_path / f"out/tpu_0/mlp/shard_0003.{format_name}").unlink()
    run(wanted)
    assert committed_files(tmp_path / "out") == before


@pytest.mark.parametrize("format_name", [name for name in FORMATS if "bfloat16" not in FORMATS[name].dtypes])
def test_a_dtype_that_a_format_does_not_have_is_refused_and_named(config, format_name):
    wanted = f"--format {format_name} has no bfloat16: use --dtype float16 or --dtype float32, or --format safetensors"
    with pytest.raises(UsageError, match=wanted):
        replace(config, format=format_name, dtype="bfloat16")
    with pytest.raises(UsageError, match=f"--format {format_name} has no fp8: use --quantize int8"):
        replace(config, format=format_name, quantize="fp8")


def test_a_format_whose_package_is_missing_is_refused_before_anything_is_read(config, monkeypatch):
    require_format.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"the format parquet needs pyarrow: pip install"):
        replace(config, format="parquet")
    require_format.cache_clear()


def test_bad_records_are_refused_with_file_and_line_or_set_aside_and_listed(config, tmp_path):
    lines = token_lines(9)
    lines.insert(6, '{"input_ids": [1, 2')
    stream = write_jsonl(tmp_path / "stream.jsonl", lines)
    with pytest.raises(RunError, match=rf"{stream}:7: "):
        run(config)
    assert committed_files(tmp_path / "out") == {}
    summary = run(replace(config, max_bad_records=1))
    assert (summary.samples, summary.bad_records) == (9, 1)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/tpu_0").glob("shard_*.json"))]
    assert [bad["line"] for record in records for bad in record["bad_records"]] == [7]
    assert sorted({index for _, index in shard_arrays(tmp_path / "out/tpu_0")}) == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_machines_share_a_stream_without_overlap_or_gap(config, tmp_path):
    for machine in range(3):
        run(replace(config, machine_id=machine, total_machines=3, worker_id=machine))
    indices = [sorted({i for _, i in shard_arrays(tmp_path / "out" / f"tpu_{m}")}) for m in range(3)]
    assert indices == [list(range(m, 40, 3)) for m in range(3)]


def test_the_same_arc_sample_gives_the_same_prompt_on_any_worker(config, tmp_path):
    write_jsonl(tmp_path / "stream.jsonl", arc_lines(5))
    arc = replace(config, predictions_per_task=3, max_seq_length=1024, layers_to_extract=(0,), dtype="float32")
    run(arc)
    whole = shard_arrays(tmp_path / "out/tpu_0")
    assert sorted(index for _, index in whole) == list(range(15))
    run(replace(arc, machine_id=1, total_machines=2, output_dir=str(tmp_path / "half")))
    half = shard_arrays(tmp_path / "half/tpu_0")
    assert sorted(index for _, index in half) == [3, 4, 5, 9, 10, 11]
    for key, array in half.items():
        np.testing.assert_allclose(array, whole[key], rtol=1e-4, atol=1e-5)


def test_the_checkpoint_file_says_where_the_worker_is(config, tmp_path):
    run(config)
    checkpoint = json.loads((tmp_path / "checkpoints/checkpoint_worker_0.json").read_text())
    assert checkpoint == {
        "worker_id": 0,
        "last_processed_sample_idx": 39,
        "total_samples_processed": 40,
        "total_shards": len(list((tmp_path / "out/tpu_0").glob("shard_*.pkl.gz"))),
        "dataset_path": config.dataset_path,
        "model_path": config.model_path,
        "status": "complete",
    }


def test_metadata_lists_every_shard_with_its_size_and_samples(config, tmp_path):
    run(config)
    metadata = json.loads((tmp_path / "out/tpu_0/metadata.json").read_text())
    assert metadata["total_unique_samples"] == 40
    assert metadata["total_activations"] == 40 * N_LAYERS
    assert metadata["total_shards"] == len(metadata["shards"])
    for shard in metadata["shards"]:
        path = tmp_path / "out/tpu_0" / shard["filename"]
        assert path.stat().st_size == shard["file_size"]
        stored = pickle.loads(gzip.decompress(path.read_bytes()))
        assert {str(layer): len(items) for layer, items in stored.items()} == shard["samples_per_layer"]


def test_a_plan_counts_what_the_run_then_does(config):
    plan = price_run(replace(config, plan=True))
    assert not Path(config.output_dir).exists()
    summary = run(config)
    assert (plan.samples, plan.tokens, plan.shards) == (summary.samples, summary.tokens, summary.shards)
    assert 0 <= plan.padding_waste < 0.6
    assert 0.7 < plan.bytes_on_disk / summary.bytes < 1.3
    assert plan.estimated_seconds > 0


def test_a_run_that_cannot_fit_on_the_disk_is_refused_at_the_start(config, monkeypatch):
    monkeypatch.setattr("core.object_store.LocalStore.free_bytes", lambda self: 10_000)
    with pytest.raises(RunError, match=r"the run needs about .* 9.8 KiB are free"):
        run(config)
    assert price_run(replace(config, plan=True)).fits_on_disk is False


def test_no_more_windows_are_in_memory_than_stated_however_slow_the_storage(config, monkeypatch):
    arrays: list[weakref.ref[np.ndarray]] = []
    most = 0
    allocate, store = WindowActivations.allocate.__func__, ActivationStorage.store

    def counting(cls, *args):
        nonlocal most
        activations = allocate(cls, *args)
        arrays.extend(map(weakref.ref, activations.arrays.values()))
        most = max(most, sum(array() is not None for array in arrays))
        return activations

    def slow(self, window, file):
        time.sleep(0.2)
        return store(self, window, file)

    monkeypatch.setattr(WindowActivations, "allocate", classmethod(counting))
    monkeypatch.setattr(ActivationStorage, "store", slow)
    assert run(replace(config, shard_size_gb=30_000 / 2**30)).shards > 3 * WINDOWS_IN_MEMORY
    assert most <= WINDOWS_IN_MEMORY


def test_a_foreign_file_under_a_shards_name_is_refused_not_adopted(config, tmp_path):
    run(config)
    folder = tmp_path / "out/tpu_0"
    foreign = (folder / "shard_0001.pkl.gz").read_bytes()
    for record in sorted(folder.glob("shard_*.json"))[3:]:
        record.unlink()
    for content in (b"junk", foreign, foreign[:-20]):
        (folder / "shard_0004.pkl.gz").write_bytes(content)
        with pytest.raises(RunError, match=r"shard_0004\.pkl\.gz exists without a commit record"):
            run(config)
        assert not (folder / "shard_0004.json").exists()


def test_shards_of_another_run_whose_records_are_gone_are_refused(config, tmp_path):
    run(config)
    for path in [tmp_path / "out/run.json", *(tmp_path / "out/tpu_0").glob("*.json")]:
        path.unlink()
    with pytest.raises(RunError, match="does not contain this window"):
        run(replace(config, layers_to_extract=(1,)))


def test_a_file_that_differs_in_rounding_alone_is_kept_and_named_as_it_is(config, tmp_path):
    fp32 = replace(config, dtype="float32")
    run(fp32)
    before = committed_files(tmp_path / "out")
    for record in (tmp_path / "out/tpu_0").glob("shard_*.json"):
        record.unlink()
    # Other shapes of the batch round differently, as other hardware does.
    run(replace(fp32, pack=False, batch_size=1))
    assert verify(str(tmp_path / "out")).ok
    assert committed_files(tmp_path / "out") == before


def test_a_lost_record_or_file_is_made_again(config, tmp_path):
    run(config)
    before = committed_files(tmp_path / "out")
    for lost in ("shard_0003.json", "shard_0002.pkl.gz", "samples_0004.jsonl.gz"):
        (tmp_path / "out/tpu_0" / lost).unlink()
        assert not verify(str(tmp_path / "out")).ok
        run(config)
        assert committed_files(tmp_path / "out") == before


def test_the_same_sites_in_any_order_and_number_are_the_same_run(config, tmp_path):
    run(replace(config, activation_type=("residual", "mlp", "residual")))
    assert run(replace(config, activation_type=("mlp", "residual"))).samples == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["sites"] == ["mlp", "residual"]


@pytest.mark.parametrize(
    "change",
    [{"shard_size_gb": float("inf")}, {"output_dir": "http://host/x"}, {"output_dir": "memory://x"}, {"batch_size": 0}],
)
def test_flags_that_cannot_be_are_refused_by_name(config, change):
    (name,) = change
    with pytest.raises(UsageError, match=f"--{name}"):
        replace(config, **change)


@pytest.mark.parametrize("flag", ["output_dir", "checkpoint_dir"])
def test_a_folder_that_cannot_be_written_is_found_out_before_weights_are_loaded(config, tmp_path, flag, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("core.jax_utils.load_model", lambda *args, **kwargs: pytest.fail("the weights were loaded"))
    with pytest.raises((RunError, OSError), match="file"):
        run(replace(config, **{flag: str(tmp_path / "file" / "below")}))


def test_metrics_that_cannot_be_kept_are_no_reason_to_stop(config, tmp_path):
    (tmp_path / "out/tpu_0/metrics.jsonl").mkdir(parents=True)
    assert run(config).status == "complete"
