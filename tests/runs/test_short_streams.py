"""A stream with fewer lines than machines: who gets none is done, and everybody can tell."""

import json
from pathlib import Path

import pytest
from fake_gcs import FakeGcs, gcs_environment
from tiny_run import cache_dir, extract, run, token_lines, write_jsonl, write_model

from analysis.fleet_status.status import status
from analysis.verification.verify import verify
from core.base.errors import RunError
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.runner import run as extract_here
from core.run.stores import open_stores
from core.run.survey import survey_stream


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), tokenizer=False)


def config(model: Path, stream: object, out: Path, machine: int, machines: int, **changes) -> RunConfig:
    return RunConfig(
        **{
            "model_path": str(model),
            "dataset_path": str(stream),
            "output_dir": str(out),
            "checkpoint_dir": str(out.parent / "checkpoints"),
            "compilation_cache_dir": cache_dir(),
            "max_seq_length": 128,
            "worker_id": machine,
            "machine_id": machine,
            "total_machines": machines,
        }
        | changes
    )


def test_a_machine_without_a_line_is_complete_and_the_whole_is_verified(model, tmp_path):
    stream, out = write_jsonl(tmp_path / "s.jsonl", token_lines(2, longest=30)), tmp_path / "out"
    summaries = [extract_here(config(model, stream, out, machine, 4)) for machine in range(4)]
    assert [(summary.status, summary.exit_code, summary.samples) for summary in summaries] == [
        ("complete", 0, 1), ("complete", 0, 1), ("complete", 0, 0), ("complete", 0, 0),
    ]  # fmt: skip
    report = verify(str(out))
    assert report.ok, report.lines()
    assert [folder.complete for folder in report.folders] == [True] * 4
    assert status(str(out)).finished
    assert sorted(path.name for path in (out / "tpu_3").iterdir()) == [
        "metadata.json", "metrics.jsonl", "shard_0001.json", "stream.json",
    ]  # fmt: skip
    # Again: there is still nothing to do, and another share in the same folder is refused as ever.
    assert extract_here(config(model, stream, out, 3, 4)).status == "complete"
    with pytest.raises(RunError, match="belongs to another run"):
        extract_here(config(model, stream, out, 3, 5))


def test_the_command_of_a_machine_without_a_line_ends_well(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(1, longest=30))
    share = ("--machine_id", 1, "--total_machines", 2, "--worker_id", 1, "--max_seq_length", 128)
    done = extract(tmp_path, "--model_path", model, "--dataset_path", "s.jsonl", *share, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "complete"
    assert "has no line for this machine" in done.stderr
    alone = run("analyze_activations.py", "verify", "activations/tpu_1", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr


def test_a_stream_of_which_every_line_is_bad_is_still_an_error(model, tmp_path):
    stream = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": "bad"}, {"input_ids": [1]}])
    with pytest.raises(RunError, match="no usable sample for machine 0 of 2"):
        extract_here(config(model, stream, tmp_path / "out", 0, 2, max_bad_records=5))
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(RunError, match="the stream is empty"):
        extract_here(config(model, empty, tmp_path / "out", 0, 1))


def test_a_stream_in_a_bucket_is_looked_through_once_before_it_is_read(model, tmp_path, monkeypatch):
    stream = write_jsonl(tmp_path / "s.jsonl", token_lines(500, longest=30))
    with FakeGcs() as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        server.state.insert("bucket", {"name": "s.jsonl"}, stream.read_bytes(), {})
        job = prepare_job(config(model, "gs://bucket/s.jsonl", tmp_path / "out", 0, 1), "float32")
        assert open_stores(job.config).mirror is None
        before = server.count("object.media")
        survey = survey_stream(job)
        assert server.count("object.media") == before + 1
    assert survey.samples == 500
    tokens = sum(len(line["input_ids"]) for line in token_lines(500, longest=30))
    assert survey.tokens == pytest.approx(tokens, rel=0.15)
