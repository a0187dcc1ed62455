"""The described commands against a bucket: the real gcsfs over HTTP, faults included."""

import gzip
import itertools
import json
import pickle
import socket
from pathlib import Path

import pytest
from fake_gcs import CommitThenReset, CommitThenStatus, FakeGcs, Reset, Status, gcs_environment
from tiny_run import (
    arc_lines,
    cache_dir,
    committed_files,
    environment,
    extract,
    run,
    token_lines,
    write_jsonl,
    write_model,
)


@pytest.fixture
def bucket():
    with FakeGcs(["your-bucket"]) as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def objects(server: FakeGcs, prefix: str = "activations/") -> dict[str, bytes]:
    """The bucket's objects below the prefix, by the name they would have in a local output folder."""
    return {
        name.removeprefix(prefix): data
        for name, data in server.objects("your-bucket").items()
        if name.startswith(prefix)
    }


def shard_objects(objects: dict[str, bytes]) -> dict[str, bytes]:
    """All but the index, which says where it is."""
    return {name: data for name, data in objects.items() if not name.endswith("metadata.json")}


def test_the_single_worker_command_runs_as_written(model, bucket, tmp_path):
    """Seed commands of one worker, with the model's name replaced by a folder that has three layers."""
    write_jsonl(tmp_path / "data/stream_000.jsonl", arc_lines(4))
    flags = "--dataset_path data/stream_0.jsonl --batch_size 4 --layers_to_extract 0 1 2 --activation_type residual"
    args = (*flags.split(), "--model_path", model, "--gcs_bucket", "your-bucket", "--upload_to_gcs")
    result = extract(tmp_path, *args, **gcs_environment(bucket))
    assert result.returncode == 0, result.stderr
    stored = objects(bucket)
    shard = pickle.loads(gzip.decompress(stored["tpu_0/shard_0001.pkl.gz"]))
    assert {layer: len(items) for layer, items in shard.items()} == {0: 32, 1: 32, 2: 32}
    assert json.loads(stored["tpu_0/metadata.json"])["gcs_bucket"] == "your-bucket"
    # The local copy is a complete output folder of its own.
    local = committed_files(tmp_path / "activations")
    assert local == stored
    assert run("analyze_activations.py", "verify", "activations", cwd=tmp_path).returncode == 0
    remote = ("verify", "gs://your-bucket/activations")
    assert run("analyze_activations.py", *remote, cwd=tmp_path, **gcs_environment(bucket)).returncode == 0


def test_two_workers_with_their_own_streams_share_the_bucket(model, bucket, tmp_path):
    for worker in range(2):
        write_jsonl(tmp_path / f"data/stream_00{worker}.jsonl", arc_lines(2, seed=worker))
    for worker in range(2):
        args = ("--model_path", model, "--dataset_path", f"data/stream_{worker}.jsonl")
        env = gcs_environment(bucket) | {"TPU_WORKER_ID": str(worker)}
        result = extract(tmp_path, *args, "--gcs_bucket", "your-bucket", "--upload_to_gcs", **env)
        assert result.returncode == 0, result.stderr
    assert {name.split("/")[0] for name in objects(bucket)} == {"run.json", "tpu_0", "tpu_1"}


@pytest.fixture(scope="module")
def calm_run(model, tmp_path_factory) -> tuple[tuple[object, ...], dict[str, bytes]]:
    """The flags of a run of several windows, and what it leaves in a local folder."""
    folder = tmp_path_factory.mktemp("calm")
    stream = write_jsonl(folder / "s.jsonl", token_lines(25))
    args = ("--model_path", model, "--dataset_path", stream, "--max_seq_length", 256, "--shard_size_gb", 0.0001)
    assert extract(folder, *args, "--output_dir", "calm").returncode == 0
    return args, shard_objects(committed_files(folder / "calm"))


def test_nothing_stays_on_the_local_disk_when_it_is_to_be_deleted(calm_run, bucket, tmp_path):
    args, calm = calm_run
    upload = ("--gcs_bucket", "your-bucket", "--upload_to_gcs", "--delete_local_after_upload", "--output_dir", "spool")
    result = extract(tmp_path, *args, *upload, **gcs_environment(bucket))
    assert result.returncode == 0, result.stderr
    assert shard_objects(objects(bucket)) == calm
    assert not [path for path in (tmp_path / "spool").rglob("*") if path.is_file()]


def test_input_and_output_may_be_bucket_urls(calm_run, bucket, tmp_path):
    args, calm = calm_run
    stream = Path(args[args.index("--dataset_path") + 1])
    bucket.state.insert("your-bucket", {"name": "in/s.jsonl"}, stream.read_bytes(), {})
    where = ("--dataset_path", "gs://your-bucket/in/s.jsonl", "--output_dir", "gs://your-bucket/out")
    result = extract(tmp_path, *args, *where, **gcs_environment(bucket))
    assert result.returncode == 0, result.stderr
    assert shard_objects(objects(bucket, "out/")) == calm
    again = extract(tmp_path, *args, *where, **gcs_environment(bucket))
    assert "is complete: nothing to do" in again.stderr


UPLOAD_FAULTS = {
    "lost acknowledgement of every object": CommitThenStatus(503),
    "reply cut off after every commit": CommitThenReset(),
    "unavailable": Status(503),
    "too many requests": Status(429),
    "reset": Reset(),
}


@pytest.mark.parametrize("fault", UPLOAD_FAULTS)
def test_faults_of_the_storage_change_nothing_in_the_result(fault, calm_run, bucket, tmp_path):
    args, calm = calm_run
    uploads = itertools.count()
    # Every other upload is hit, so every object is hit once and its second try goes through.
    bucket.faults.add(
        lambda call: call.kind.startswith("upload") and next(uploads) % 2 == 0, UPLOAD_FAULTS[fault], times=None
    )
    result = extract(tmp_path, *args, "--output_dir", "gs://your-bucket/activations", **gcs_environment(bucket))
    assert result.returncode == 0, result.stderr
    assert bucket.faults.taken >= len(calm)
    assert shard_objects(objects(bucket)) == calm
    shards = [name for name in objects(bucket) if not name.endswith("metadata.json")]
    assert all(len(bucket.generations(f"activations/{name}", "your-bucket")) == 1 for name in shards)


def test_an_upload_that_keeps_failing_ends_the_run_with_one_line_and_a_later_run_heals(calm_run, bucket, tmp_path):
    args, calm = calm_run
    where = ("--output_dir", "gs://your-bucket/activations")
    committed = "activations/tpu_0/shard_0001.json"
    bucket.faults.add(
        lambda call: call.kind.startswith("upload") and committed in bucket.objects("your-bucket"),
        Status(403),
        times=None,
    )
    result = extract(tmp_path, *args, *where, **gcs_environment(bucket))
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "your-bucket" in errors[0]
    assert "tpu_0/shard_0002.json" not in objects(bucket)
    bucket.faults.clear()
    assert extract(tmp_path, *args, *where, **gcs_environment(bucket)).returncode == 0
    assert shard_objects(objects(bucket)) == calm


def test_a_bucket_that_does_not_exist_is_one_line(model, bucket, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(3))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256)
    result = extract(tmp_path, *args, "--output_dir", "gs://no-such-bucket/x", **gcs_environment(bucket))
    assert result.returncode in (1, 2)
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ") and "no-such-bucket" in line]


def test_the_multi_host_command_runs_as_written_on_two_hosts(model, bucket, tmp_path, forks):
    write_jsonl(tmp_path / "s.jsonl", token_lines(40))
    env = gcs_environment(bucket)
    dataset = ("--dataset_name", "s.jsonl", "--sharded", "--num_shards", 4)
    made = run(
        "create_dataset_streams.py", *dataset, "--output_dir", "gs://your-bucket/sharded_dataset", cwd=tmp_path, **env
    )
    assert made.returncode == 0, made.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seed_flags = (
        "--use_sharded_dataset --sharded_dataset_dir gs://your-bucket/sharded_dataset --multihost --num_hosts 2 "
        f"--coordinator_address 127.0.0.1:{port} --gcs_bucket your-bucket"
    )
    here = ("--model_path", model, "--max_seq_length", 256, "--compilation_cache_dir", cache_dir())
    hosts = [
        forks.command(
            *("extract_activations.py", *seed_flags.split(), "--host_id", host, *here, "--output_dir", f"host{host}"),
            cwd=tmp_path,
            env=environment(TPU_WORKER_ID=str(host), **env),
        )
        for host in range(2)
    ]
    for host in hosts:
        assert host.wait() == 0, host.errors
    shards = {name.split("/")[0] for name in objects(bucket) if "/shard_0001_part_1.pkl.gz" in name}
    assert shards == {f"shard_00{i}" for i in range(4)}
    remote = ("verify", "gs://your-bucket/activations")
    assert run("analyze_activations.py", *remote, cwd=tmp_path, **env).returncode == 0


def test_a_local_folder_of_another_run_is_refused_before_the_bucket_is_touched(model, bucket, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(5))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256)
    upload = ("--upload_to_gcs", "--gcs_bucket", "your-bucket")
    assert extract(tmp_path, *args, "--layers_to_extract", 1).returncode == 0
    refused = extract(tmp_path, *args, "--layers_to_extract", 2, *upload, **gcs_environment(bucket))
    assert refused.returncode == 2
    assert "layers: [1] there, [2] here" in refused.stderr
    assert objects(bucket) == {}


def test_the_local_copy_names_no_bytes_that_it_does_not_hold(model, bucket, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(20))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256, "--dtype", "float32")
    args += ("--upload_to_gcs", "--gcs_bucket", "your-bucket")
    env = gcs_environment(bucket)
    assert extract(tmp_path, *args, **env).returncode == 0
    bucket.state.delete("your-bucket", "activations/tpu_0/shard_0001.json", {})
    for name in ("shard_0001.json", "shard_0001.pkl.gz"):
        (tmp_path / "activations/tpu_0" / name).unlink()
    again = extract(tmp_path, *args, "--no_pack", "--batch_size", 1, **env)
    assert again.returncode == 0, again.stderr
    assert "not committed locally" in again.stderr
    assert not (tmp_path / "activations/tpu_0/shard_0001.json").exists()
    remote = ("verify", "gs://your-bucket/activations")
    assert run("analyze_activations.py", *remote, cwd=tmp_path, **env).returncode == 0
