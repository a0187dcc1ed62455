"""Each export has the layout that its readers expect, and the values of the run. The tools: tests/interop."""

import json

import numpy as np
import pytest
from exported_run import LAYER, WIDTH, contexts, make_run, rows_as_set, samples_of
from safetensors.numpy import load_file

from analysis.commands import export_commands
from analyze_activations import export
from core.base.errors import RunError, UsageError

HOOK = f"blocks.{LAYER}.hook_resid_post"
SMALL = {"file_mb": 0.0002, "site": "residual", "layer": LAYER}
"""Several files for the few tokens of the run."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def samples(run):
    return samples_of(run)


@pytest.fixture(scope="module")
def bfloat16_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("bf16"), dtype="bfloat16")


def test_npz_chunks_are_padded_under_a_mask(run, samples, tmp_path):
    report = export(run, "npz", output=tmp_path / "out", **SMALL | {"file_mb": 0.001})
    described = json.loads((tmp_path / "out/metadata.json").read_text())
    assert (described["seq_len"], described["n_samples"], described["n_tokens"]) == (30, 8, 65)
    chunks = [np.load(tmp_path / "out" / chunk["file"]) for chunk in described["chunks"]]
    assert len(chunks) == report.files == 4
    seen = 0
    for chunk in chunks:
        assert chunk["activations"].shape[1:] == (30, WIDTH)
        assert chunk["activations"].dtype == np.float16
        for values, mask, ids in zip(*(chunk[n] for n in ("activations", "attention_mask", "token_ids")), strict=True):
            n = len(samples[seen].values)
            assert mask.tolist() == [1] * n + [0] * (30 - n)
            np.testing.assert_array_equal(values[:n], samples[seen].values)
            np.testing.assert_array_equal(ids[:n], samples[seen].token_ids)
            assert not values[n:].any()
            seen += 1
    assert seen == len(samples)


@pytest.mark.parametrize("size", [None, 4])
def test_datasets_loads_the_parquet_folder_by_its_card(run, samples, tmp_path, size):
    datasets = pytest.importorskip("datasets")
    export(run, "parquet", output=tmp_path / "out", context_size=size, **SMALL)
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    wanted = contexts(samples, size or 99, keeps_short=True)
    check_table(found, wanted, samples)


@pytest.mark.parametrize("size", [None, 4])
def test_datasets_maps_the_arrow_folder(run, samples, tmp_path, size):
    datasets = pytest.importorskip("datasets")
    export(run, "arrow", output=tmp_path / "out", context_size=size, **SMALL)
    check_table(
        datasets.load_from_disk(str(tmp_path / "out")), contexts(samples, size or 99, keeps_short=True), samples
    )


def check_table(found, wanted, samples):
    name = f"residual_layer_{LAYER}"
    assert found.features[name].shape == (None, WIDTH)
    assert found.features[name].dtype == "float16"
    arrays = found.select_columns([name]).with_format("numpy", dtype=np.float16)
    assert len(arrays) == len(wanted)
    for row, array, (values, ids) in zip(found, arrays, wanted, strict=True):
        assert array[name].dtype == np.float16
        np.testing.assert_array_equal(array[name], values)
        assert row["token_ids"] == ids.tolist()
        assert json.loads(row["labels"]) == {"parity": row["sample_idx"] % 2}
        sample = next(sample for sample in samples if sample.sample_idx == row["sample_idx"])
        assert sample.token_ids[row["positions"]].tolist() == row["token_ids"]


def test_safetensors_files_hold_rows_and_offsets_also_in_bfloat16(bfloat16_run, tmp_path):
    samples = samples_of(bfloat16_run)
    export(bfloat16_run, "safetensors", output=tmp_path / "out", **SMALL)
    seen = 0
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        tensors = load_file(path)
        assert tensors["activations"].dtype == samples[0].values.dtype
        for start, stop, index in zip(tensors["offsets"], tensors["offsets"][1:], tensors["sample_idx"], strict=False):
            assert index == samples[seen].sample_idx
            np.testing.assert_array_equal(tensors["activations"][start:stop], samples[seen].values)
            np.testing.assert_array_equal(tensors["positions"][start:stop], samples[seen].positions)
            seen += 1
    assert seen == len(samples)


@pytest.mark.parametrize("size", [None, 4])
def test_sae_lens_rows_are_contexts_of_one_size_in_random_order(run, samples, tmp_path, size):
    datasets = pytest.importorskip("datasets")
    report = export(run, "sae_lens", output=tmp_path / "out", context_size=size, **SMALL)
    found = datasets.load_from_disk(str(tmp_path / "out"))
    size = size or 1
    assert found.features[HOOK].shape == (size, WIDTH)
    arrays = np.stack([row[HOOK] for row in found.select_columns([HOOK]).with_format("numpy", dtype=np.float16)])
    wanted = contexts(samples, size, keeps_short=False)
    in_order = np.stack([values for values, _ in wanted])
    assert rows_as_set(arrays) == rows_as_set(in_order)
    place = {values.tobytes(): number for number, (values, _) in enumerate(wanted)}
    order = np.array([place[array.tobytes()] for array in arrays])
    assert (np.diff(order) == 1).mean() < 0.3  # neighbours are not neighbours any more
    n_first = datasets.Dataset.from_file(str(sorted((tmp_path / "out").glob("data-*.arrow"))[0])).num_rows
    assert 0 < n_first < len(order) / 2
    assert size == 1 or sorted(order[:n_first]) != list(range(n_first))  # files are mixed, too
    ids = {values.tobytes(): ids.tolist() for values, ids in wanted}
    assert all(ids[array.tobytes()] == row["token_ids"] for array, row in zip(arrays, found, strict=True))
    assert report.n_short == sum(len(sample.values) % size for sample in samples)


def test_sae_lens_lists_of_ids_are_those_that_datasets_3_knows(run, tmp_path):
    export(run, "sae_lens", output=tmp_path / "out", context_size=4, **SMALL)
    features = json.loads((tmp_path / "out/dataset_info.json").read_text())["features"]
    assert features["token_ids"]["_type"] == "Sequence"


def test_llamascopium_chunks_are_flat(bfloat16_run, tmp_path):
    samples = samples_of(bfloat16_run)
    export(bfloat16_run, "llamascopium", output=tmp_path / "out", drop="first", **SMALL)
    chunks = [load_file(path) for path in sorted((tmp_path / "out" / HOOK).iterdir())]
    wanted = contexts(samples, 99, keeps_short=True, skip=1)
    np.testing.assert_array_equal(
        np.concatenate([chunk["activation"] for chunk in chunks]), np.concatenate([values for values, _ in wanted])
    )
    np.testing.assert_array_equal(
        np.concatenate([chunk["tokens"] for chunk in chunks]), np.concatenate([ids for _, ids in wanted])
    )
    for chunk in chunks:
        assert (chunk["tokens"].dtype, chunk["mask"].dtype) == (np.int64, np.int32)
        assert chunk["mask"].all()
        assert chunk["attention_mask"].all()


def test_llamascopium_chunks_of_contexts_are_padded_under_a_mask(run, samples, tmp_path):
    export(run, "llamascopium", output=tmp_path / "out", context_size=4, **SMALL)
    chunks = [load_file(path) for path in sorted((tmp_path / "out" / HOOK).iterdir())]
    wanted = contexts(samples, 4, keeps_short=True)
    stacked = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in ("activation", "tokens", "mask")}
    assert stacked["activation"].shape == (len(wanted), 4, WIDTH)
    for place, (values, ids) in enumerate(wanted):
        assert stacked["mask"][place].tolist() == [1] * len(ids) + [0] * (4 - len(ids))
        np.testing.assert_array_equal(stacked["activation"][place, : len(ids)], values)
        assert stacked["tokens"][place, : len(ids)].tolist() == ids.tolist()


def test_activault_files_have_one_size_and_statistics_of_all_rows(bfloat16_run, tmp_path):
    torch = pytest.importorskip("torch")
    samples = samples_of(bfloat16_run)
    report = export(bfloat16_run, "activault", output=tmp_path / "out", context_size=4, **SMALL)
    folder = tmp_path / f"out/models.layers.{LAYER}.post"
    described = json.loads((folder / "metadata.json").read_text())
    paths = sorted(folder.glob("*.saved.pt"))
    assert len(paths) == report.files > 1
    assert {path.stat().st_size for path in paths} == {described["bytes_per_file"]}
    saved = [torch.load(path, weights_only=True) for path in paths]
    assert {tuple(each["states"].shape) for each in saved} == {tuple(described["shape"])}
    assert described["dtype"] == "torch.bfloat16"
    assert str(saved[0]["states"].dtype) == "torch.bfloat16"
    rows = np.concatenate([each["states"].float().numpy().reshape(-1, WIDTH) for each in saved]).astype(np.float64)
    wanted = {values.astype(np.float32).tobytes() for values, _ in contexts(samples, 4, keeps_short=False)}
    found = [context.tobytes() for each in saved for context in each["states"].float().numpy()]
    assert len(set(found)) == len(found) == report.items
    assert set(found) <= wanted
    assert report.n_left_over == len(wanted) - len(found)
    statistics = json.loads((folder / "statistics.json").read_text())
    np.testing.assert_allclose(statistics["mean"], rows.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(statistics["std"], rows.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(statistics["norm"], np.linalg.norm(rows, axis=1).mean(), rtol=1e-12)


@pytest.mark.parametrize("to", ["npz", "parquet", "arrow", "sae_lens"])
def test_bfloat16_is_refused_where_a_format_has_none_and_converted_when_asked(bfloat16_run, tmp_path, to):
    with pytest.raises(
        UsageError, match=rf"bfloat16, which {to} does not have: use --dtype float16 or --dtype float32"
    ):
        export(bfloat16_run, to, output=tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
    assert export(bfloat16_run, to, output=tmp_path / "out", dtype="float16", **SMALL).tokens == 65


def test_a_value_that_does_not_fit_is_refused_naming_its_sample(tmp_path):
    from benchmarks.storage import synthetic_run

    def huge(*arguments):
        return random(*arguments) * np.float32(1e5)

    random, synthetic_run._random = synthetic_run._random, huge
    try:
        run = make_run(tmp_path / "run", dtype="float32")
    finally:
        synthetic_run._random = random
    with pytest.raises(RunError, match=r"sample 0: .* does not fit float16: use --dtype float32 or --dtype bfloat16"):
        export(run, "npz", output=tmp_path / "out", dtype="float16", **SMALL)


def test_a_selection_keeps_its_positions(tmp_path):
    run = make_run(tmp_path / "run", dropped=0.4)
    export(run, "safetensors", output=tmp_path / "out", **SMALL)
    wanted = np.concatenate([sample.positions for sample in samples_of(run)])
    tensors = [load_file(path) for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    np.testing.assert_array_equal(np.concatenate([each["positions"] for each in tensors]), wanted)


def test_the_command_names_every_target_and_source():
    from analysis.exporting.targets import TARGETS
    from analysis.importing.importing import _SOURCES

    assert tuple(TARGETS) == ("npz", "parquet", "arrow", "safetensors", "sae_lens", "llamascopium", "activault")
    assert set(TARGETS) == set(export_commands.EXPORT_FORMATS)
    assert set(_SOURCES) == set(export_commands.IMPORT_KINDS)
