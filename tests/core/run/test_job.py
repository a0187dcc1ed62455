"""What is known, sized and refused before weights are loaded."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_run import cache_dir, token_lines, write_jsonl, write_model

from core.base.dtypes import DTYPES
from core.base.errors import ModelError, RunError, UsageError
from core.dataset_utils import BadRecord
from core.pricing.plan import format_duration
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.job import Job
from core.run.survey import check_disk_space, disk_needed, stored_bytes, survey_stream
from core.shards.formats import FORMATS
from core.shards.formats.pickle_shard import PickleFormat


class Halving(PickleFormat):
    """A format that may be gzipped and stores half of the bytes."""

    expected_ratio = dict.fromkeys(DTYPES, 0.5)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    home = tmp_path_factory.mktemp("job")
    return RunConfig(
        model_path=str(write_model(home / "model")),
        dataset_path=str(write_jsonl(home / "s.jsonl", token_lines(50))),
        output_dir=str(home / "out"),
        compilation_cache_dir=cache_dir(),
        max_seq_length=256,
    )


def job_of(config: RunConfig, **changes) -> Job:
    return prepare_job(replace(config, **changes), "float32")


def test_every_site_has_its_own_bytes_and_the_largest_ends_a_window(config):
    job = job_of(config, activation_type=("embedding", "k", "mlp_act"), layers_to_extract=(0, 2), dtype="float32")
    assert job.layers == {"embedding": (-1,), "k": (0, 2), "mlp_act": (0, 2)}
    assert job.bytes_per_token == {"embedding": 32 * 4, "k": 2 * 16 * 4, "mlp_act": 2 * 64 * 4}
    (window,) = replace(job, config=replace(job.config, shard_size_gb=1.0)).windows()
    edge = window.n_tokens * 512
    assert len(list(replace(job, config=replace(job.config, shard_size_gb=(edge - 1) / 2**30)).windows())) <= 2
    assert len(list(replace(job, config=replace(job.config, shard_size_gb=edge / 4 / 2**30)).windows())) in (4, 5)


def test_what_the_backend_is_asked_for_follows_capture_and_selection(config):
    job = job_of(config, activation_type=("q", "residual", "resid_pre"), dtype="bfloat16")
    assert (job.step_request.capture, job.step_request.stored_dtype) == (job.capture, "bfloat16")
    assert job.step_request.norm_sites == ()
    job = job_of(config, activation_type=("q", "residual", "resid_pre"), exclude_norm_outliers=5.0)
    assert job.step_request.norm_sites == ("resid_pre", "residual")


class OneRow:
    name, can_pack, has_long_rows = "one", False, False

    def row_multiple(self, model, request):
        return 3


def test_a_backend_that_cannot_pack_gets_one_sample_a_row(config):
    job = job_of(config)
    assert job.batch_shape.pack
    shape = replace(job, backend=OneRow()).batch_shape
    assert (shape.pack, shape.row_multiple, shape.rows_per_step) == (False, 3, 12)
    assert not job_of(config, pack=False).batch_shape.pack


def test_samples_carry_the_reasons_that_are_known_before_and_bad_records_pass(config):
    job = job_of(config, positions=("1:3",), exclude_norm_outliers=4.0, max_tokens_per_sample=1)
    sample = next(item for item in job.items() if len(item.token_ids) > 3)
    assert np.flatnonzero(sample.reasons == 0).tolist() == [1, 2]
    assert (sample.most_stored, sample.n_stored) == (1, 1)
    bad = BadRecord(3, 4, "broken")
    assert job.select(bad) is bad
    assert all(item.reasons is None for item in job_of(config).items())


def test_a_survey_counts_what_is_seen_and_what_is_stored(config):
    lengths = [len(line["input_ids"]) for line in token_lines(50)]
    everything, selected = survey_stream(job_of(config)), survey_stream(job_of(config, positions=(":5",)))
    assert (everything.samples, everything.tokens, everything.rows) == (50, sum(lengths), sum(lengths))
    assert (selected.tokens, selected.rows) == (sum(lengths), sum(min(5, length) for length in lengths))


def test_bytes_on_disk_are_those_of_stored_tokens_and_of_all_token_ids(config):
    job = job_of(config, activation_type=("k", "residual"), layers_to_extract=(0,), compress_shards=False)
    assert stored_bytes(job, 1000, 100) == 100 * (16 + 32) * 2 + 4 * 1000
    assert disk_needed(job, 1000, 100) == stored_bytes(job, 1000, 100)
    remote = replace(job, config=replace(job.config, output_dir="gs://bucket/x", shard_size_gb=600 / 2**30))
    assert disk_needed(remote, 10**6, 10**6) == 2 * 3 * 600 * 48 // 32


def test_gzip_is_expected_to_act_on_what_the_format_leaves(config, monkeypatch):
    plain, gzipped = (stored_bytes(job_of(config, compress_shards=on), 0, 10**6) for on in (False, True))
    monkeypatch.setitem(FORMATS, "pickle", Halving())
    assert plain > gzipped
    assert [2 * stored_bytes(job_of(config, compress_shards=on), 0, 10**6) for on in (False, True)] == [plain, gzipped]


def test_a_selection_that_fits_is_not_refused_for_what_it_leaves_out(config):
    job = job_of(config, compress_shards=False)
    with pytest.raises(RunError, match="the run needs about"):
        check_disk_space(job, survey_stream(job), 0, free=100_000)
    job = job_of(config, compress_shards=False, positions=(":5",))
    check_disk_space(job, survey_stream(job), 0, free=100_000)
    with pytest.raises(RunError):
        check_disk_space(job, survey_stream(job), 0, free=1_000)


def test_a_kind_of_token_that_the_tokenizer_lacks_is_said_and_leaves_nothing_out(config, monkeypatch):
    said = []
    monkeypatch.setattr("core.run.checks.logging.warning", lambda text, *args: said.append(text % args))
    job = job_of(config, exclude_tokens=("bos", "special", "newline_first"))
    assert said == ["--exclude_tokens bos: the tokenizer has no such token, so no token is excluded"]
    assert {256, 257} <= job.facts.ids["special"]


def test_a_folder_without_a_model_or_too_long_samples_are_usage_errors(config, tmp_path):
    with pytest.raises(UsageError, match=r"5000: .* knows 4096 positions: pass --max_seq_length 4096 or less"):
        job_of(config, max_seq_length=5000)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("backend", ["auto", "jax"])
def test_a_config_that_asks_for_what_jax_lacks_is_pointed_to_torch_in_the_same_line(backend, config, tmp_path):
    model = write_model(tmp_path / "model", tokenizer=False)
    stated = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(stated | {"hidden_act": "mish"}))
    with pytest.raises(ModelError, match=r"config\.json: hidden_act 'mish' .*; --backend torch can run"):
        job_of(config, model_path=str(model), backend=backend)
    (model / "config.json").write_text(json.dumps(stated | {"hidden_size": "wide"}))
    with pytest.raises(ModelError, match="hidden_size must be a positive integer") as refused:
        job_of(config, model_path=str(model), backend=backend)
    assert "torch" not in str(refused.value), "what is broken is broken for torch too"


@pytest.mark.parametrize(("seconds", "text"), [(2.25, "2.2 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")])
def test_durations_are_for_people(seconds, text):
    assert format_duration(seconds) == text


def test_what_follows_from_a_job_is_computed_once(config):
    job = job_of(config)
    for name in ("layers", "stored", "bytes_per_row", "bytes_per_token", "step_request", "batch_shape"):
        assert getattr(job, name) is getattr(job, name), name
