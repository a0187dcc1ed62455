"""The described workflow of whitened datasets, on tiny models, beside numpy in float64 and datasets itself."""

import json

import numpy as np
import pytest
from tiny_run import D_MODEL, write_model

from analysis.text_whitening import extractor as extractor_module
from analysis.whitening import ChunkedActivationExtractor, DatasetCreator, WhiteningSettings
from core.base.errors import RunError, UsageError
from extract_activations import capture

SEQ_LEN, LAYER = 12, 1
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=rng.integers(1, 8))) for _ in range(70)] + ["a"]


def extractor(model, folder, **named) -> ChunkedActivationExtractor:
    settings = {"chunk_size": 16, "layer": LAYER, "seq_len": SEQ_LEN, "dtype": "float32", "quiet": True}
    return ChunkedActivationExtractor(model_name=model, output_dir=str(folder), **settings | named)


def counted_rows(model, texts) -> np.ndarray:
    """Every token that counts, in float64; this tokenizer adds no start token."""
    samples = capture(model, texts, layers=LAYER, max_seq_length=SEQ_LEN)["residual"][LAYER]
    return np.concatenate([sample[:SEQ_LEN] for sample in samples]).astype(np.float64)


@pytest.fixture(scope="module")
def finished(model, texts, tmp_path_factory):
    """The workflow as it is printed, with its result."""
    folder = tmp_path_factory.mktemp("out")
    rows = [{"text": text, "meta": {"pile_set_name": "Words"}} for text in texts]
    found = extractor(model, folder, exclude_tokens=["bos", "pad"])
    whitening_params = found.compute_whitening_statistics(rows)
    stored = found.process_and_store_whitened(rows, whitening_params, compression=True)
    return folder, whitening_params, stored, found.to_huggingface_dataset()


def test_the_whitened_tokens_have_the_identity_as_covariance(finished, model, texts):
    _, whitening, stored, dataset = finished
    mask = dataset["metadata"]["attention_mask"].astype(bool)
    rows = counted_rows(model, texts)
    assert (len(rows), whitening.n_samples, stored.n_tokens) == (mask.sum(),) * 3
    whitened = np.asarray(dataset["whitened_activations"])[mask].astype(np.float64)
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(D_MODEL), atol=1e-5)
    np.testing.assert_allclose(whitened, (rows - rows.mean(0)) @ whitening.transform, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whitened @ whitening.inverse + whitening.mean, rows, rtol=1e-4, atol=1e-4)


def test_the_dataset_has_the_described_structure(finished, texts):
    _, whitening, _, dataset = finished
    assert dataset["whitened_activations"].shape == (len(texts), SEQ_LEN, D_MODEL)
    metadata = dataset["metadata"]
    assert metadata["whitening_params"]["mean"].shape == (D_MODEL,)
    np.testing.assert_array_equal(metadata["whitening_params"]["transform_matrix"], whitening.transform)
    assert metadata["attention_mask"].shape == (len(texts), SEQ_LEN)
    assert metadata["sample_ids"] == list(range(len(texts)))
    assert metadata["processing_config"]["layer"] == LAYER
    row = dataset["whitened_activations"][3]
    assert not row[metadata["attention_mask"][3] == 0].any()


def test_datasets_maps_it_to_memory_and_streams_it(finished, texts):
    folder, _, _, dataset = finished
    assert len(dataset.dataset.cache_files) == 5
    assert dataset.dataset.features["whitened_activations"].shape == (SEQ_LEN, D_MODEL)
    streamed = [row["sample_ids"] for row in dataset.dataset.to_iterable_dataset()]
    assert streamed == list(range(len(texts)))
    with np.load(folder / "chunks/chunk_0001.npz") as chunk:
        assert sorted(chunk) == ["activations", "attention_mask", "sample_ids", "token_ids"]
        np.testing.assert_array_equal(chunk["activations"], dataset["whitened_activations"][16:32])


@pytest.mark.parametrize("stage", ["statistics", "whitening"])
def test_an_interrupted_pass_goes_on_and_leaves_the_same_bytes(stage, finished, model, texts, tmp_path, monkeypatch):
    """Every chunk is interrupted once while it is computed."""
    folder = finished[0]
    computed: list[int] = []
    batches = extractor_module.padded_batches

    def failing(capturer, site, layer, of_chunk, seq_len):
        computed.append(len(of_chunk))
        if len(computed) % 2:
            raise RunError("the power is cut")
        return batches(capturer, site, layer, of_chunk, seq_len)

    monkeypatch.setattr(extractor_module, "padded_batches", failing)
    found = extractor(model, tmp_path)
    if stage == "whitening":
        with monkeypatch.context() as calm:
            calm.setattr(extractor_module, "padded_batches", batches)
            extractor(model, tmp_path).compute_whitening_statistics(texts)
    for _ in range(5):
        with pytest.raises(RunError, match=r"texts from .* the power is cut"):
            run_stage(found, stage, texts, finished[1])
        # The next call gets over the chunk that failed, and fails at the one after it.
    run_stage(found, stage, texts, finished[1])
    assert sum(computed) == 2 * len(texts)
    if stage == "statistics":
        monkeypatch.setattr(extractor_module, "padded_batches", batches)
        found.process_and_store_whitened(texts, found.compute_whitening_statistics(texts))
    for path in [*folder.glob("chunks/*"), folder / "whitening.safetensors", folder / "metadata.json"]:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def run_stage(found, stage, texts, whitening) -> None:
    if stage == "statistics":
        found.compute_whitening_statistics(texts)
    else:
        found.process_and_store_whitened(texts, whitening)


def test_a_damaged_chunk_is_made_again(finished, model, texts, tmp_path):
    found = extractor(model, tmp_path)
    found.process_and_store_whitened(texts, finished[1])
    chunk = tmp_path / "chunks/chunk_0002.npz"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-9])
    found.process_and_store_whitened(texts, finished[1])
    assert chunk.read_bytes() == whole


def test_other_texts_another_whitening_and_other_settings_are_refused(finished, model, texts, tmp_path):
    found = extractor(model, tmp_path)
    found.compute_whitening_statistics(texts)
    found.process_and_store_whitened(texts, finished[1])
    others = ["changed", *texts[1:]]
    with pytest.raises(RunError, match="statistics are of other texts"):
        found.compute_whitening_statistics(others)
    fewer = extractor(model, tmp_path / "fewer")
    fewer.compute_whitening_statistics(texts[:64])
    with pytest.raises(RunError, match="statistics are of fewer texts"):
        fewer.compute_whitening_statistics(texts)
    with pytest.raises(RunError, match="statistics are of more texts"):
        found.compute_whitening_statistics(texts[:32])
    with pytest.raises(RunError, match=r"chunk_0000.npz: it is of other texts"):
        found.process_and_store_whitened(others, finished[1])
    zca = extractor(model, tmp_path / "zca", whitening=WhiteningSettings(method="zca"))
    with pytest.raises(RunError, match="another whitening"):
        found.process_and_store_whitened(texts, zca.compute_whitening_statistics(texts))
    with pytest.raises(UsageError, match="layer was 1, is 2"):
        extractor(model, tmp_path, layer=2)
    with pytest.raises(UsageError, match="row 1: no text under 'text'"):
        extractor(model, tmp_path / "rows").compute_whitening_statistics([{"text": "a"}, {"body": "b"}])


def test_a_folder_that_is_not_finished_has_no_dataset(model, texts, tmp_path):
    extractor(model, tmp_path).compute_whitening_statistics(texts)
    with pytest.raises(RunError, match="call process_and_store_whitened first"):
        DatasetCreator(str(tmp_path)).create()


def test_a_full_disk_is_refused_before_the_chunk_is_computed(finished, model, texts, tmp_path, monkeypatch):
    found = extractor(model, tmp_path)
    monkeypatch.setattr(type(found._store), "free_bytes", lambda store: 1000)
    with pytest.raises(RunError, match="the next chunk takes up to"):
        found.process_and_store_whitened(texts, finished[1])
    assert not list(tmp_path.glob("chunks/*"))


def test_values_beyond_float16_are_refused(model, texts, tmp_path):
    found = extractor(model, tmp_path, dtype="float16")
    whitening = found.compute_whitening_statistics(texts)
    object.__setattr__(whitening, "transform", whitening.transform * 1e7)
    with pytest.raises(RunError, match="use dtype='float32'"):
        found.process_and_store_whitened(texts, whitening)


def test_a_path_is_read_as_create_dataset_streams_reads_it(finished, model, texts, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = extractor(model, tmp_path / "out")
    again = found.compute_whitening_statistics(str(path))
    np.testing.assert_array_equal(again.transform, finished[1].transform)
