"""Hosts of a slice: real processes under `jax.distributed`, each with its part of every window."""

import gzip
import json
import os
import pickle
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forks import Fork, shared
from safetensors.numpy import load_file, save_file
from tiny_run import cache_dir, committed_files, environment, run, token_lines, write_jsonl, write_model

from analysis.verification.verify import verify
from core.pricing.plan import price_run
from core.run.config import RunConfig
from core.run.runner import run as run_job

FLAGS = ("--max_seq_length", 128, "--shard_size_gb", 0.0001, "--layers_to_extract", 0, 2, "--host_timeout_s", 10)
DEATHS = [(1, "store.after@3=kill")]
# More hosts than two.
SEVERAL = 3
if os.environ.get("FAULTS") == "all":
    SEVERAL = 4
    DEATHS += [(0, "commit.before@2=kill"), (1, "store.before@3=stop")]
STARTED: list[Fork] = []


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    for process in STARTED:
        process.kill()
        process.wait()
    STARTED.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and a stream."""
    folder = tmp_path_factory.mktemp("slice")
    write_model(folder / "model")
    write_jsonl(folder / "s.jsonl", token_lines(120, longest=128))
    write_jsonl(folder / "long.jsonl", token_lines(20_000, longest=128))
    return folder


@pytest.fixture(scope="module")
def calm(folder) -> Path:
    """The output of two hosts that nobody disturbs."""
    assert [code for code, _ in finish(start_slice(folder, "calm", 2))] == [0, 0]
    return folder / "calm"


def start_slice(
    folder: Path,
    out: str,
    n_hosts: int,
    *flags: object,
    stream: str = "s.jsonl",
    disks: list[Path] | None = None,
    **env: str,
) -> list[Fork]:
    """Starts the hosts; `host_0="…"` among `env` arms that host with a fault.

    out, flags: may hold {host}. disks: where each host runs.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for disk in disks or ():
        disk.mkdir()
    faults = {host: env.pop(f"host_{host}", "") for host in range(n_hosts)}
    common = ("--model_path", folder / "model", *FLAGS, "--compilation_cache_dir", cache_dir(), "--output_dir")
    source = () if "--use_sharded_dataset" in flags else ("--dataset_path", folder / stream)
    slice_flags = ("--multihost", "--num_hosts", n_hosts, "--coordinator_address", f"127.0.0.1:{port}")
    hosts = [
        shared().command(
            *("extract_activations.py", *common, out.format(host=host), *source, *slice_flags, "--host_id", host),
            *(str(flag).format(host=host) for flag in flags),
            cwd=(disks or [folder] * n_hosts)[host],
            env=environment(**env, **({"ACTIVATIONS_FAULT": fault} if fault else {})),
        )
        for host, fault in faults.items()
    ]
    STARTED.extend(hosts)
    return hosts


def finish(hosts: list[Fork]) -> list[tuple[int, str]]:
    """Exit codes and what was said."""
    return [(host.wait(), host.errors) for host in hosts]


def bytes_of(out: Path) -> dict[str, bytes]:
    """By name, without what a process that has only just died was writing."""
    files = committed_files(out).items()
    return {name: data for name, data in files if "metrics" not in name and ".tmp~" not in name}


def activations(out: Path) -> dict[tuple[int, int], np.ndarray]:
    """By layer and sample; fails if a sample is there twice."""
    found: dict[tuple[int, int], np.ndarray] = {}
    for path in sorted(out.glob("*/shard_*.pkl.gz")):
        for layer, items in pickle.loads(gzip.decompress(path.read_bytes())).items():
            for item in items:
                assert (layer, item["sample_idx"]) not in found
                found[layer, item["sample_idx"]] = item["activation"]
    return found


def test_every_host_writes_its_part_of_every_window_and_the_whole_is_that_of_one_process(folder, calm):
    windows = {path.stem for path in calm.glob("tpu_0/shard_*.json")}
    assert len(windows) >= 3
    parts = {path.name for path in calm.glob("tpu_0/shard_*.pkl.gz")}
    assert parts == {f"{window}_part_{part}.pkl.gz" for window in windows for part in range(2)}
    arguments = ("--model_path", "model", "--dataset_path", "s.jsonl", *FLAGS, "--output_dir", "alone")
    alone = run("extract_activations.py", *arguments, "--compilation_cache_dir", cache_dir(), cwd=folder)
    assert alone.returncode == 0, alone.stderr
    ours, theirs = activations(calm), activations(folder / "alone")
    assert ours.keys() == theirs.keys()
    for key, array in ours.items():
        np.testing.assert_allclose(array.astype(np.float32), theirs[key].astype(np.float32), rtol=2e-3, atol=2e-3)
    verified = run("analyze_activations.py", "verify", calm, cwd=folder)
    assert verified.returncode == 0, verified.stdout + verified.stderr


@pytest.mark.parametrize("n_hosts", [1, SEVERAL])
def test_another_number_of_hosts_finishes_with_the_same_bytes(folder, calm, n_hosts):
    out = folder / f"cut_{n_hosts}"
    shutil.copytree(calm, out)
    for path in out.glob("tpu_0/*_000[2-9]*"):
        path.unlink()
    hosts = start_slice(folder, out.name, n_hosts, "--json")
    codes, said = zip(*finish(hosts), strict=True)
    assert codes == (0,) * n_hosts, said
    printed = [host.output for host in hosts]
    assert bytes_of(out) == bytes_of(calm)
    # The first one reports for all.
    assert json.loads(printed[0])["status"] == "complete"
    assert set(printed[1:]) <= {""}
    assert ["complete: " in text for text in said] == [True] + [False] * (n_hosts - 1)


@pytest.mark.parametrize(("host", "fault"), DEATHS)
def test_the_death_of_one_host_ends_the_others_and_the_same_command_goes_on(folder, calm, host, fault):
    out = folder / f"dead_{host}_{fault.rpartition('=')[2]}"
    hosts = start_slice(folder, out.name, 2, **{f"host_{host}": fault})
    started = time.monotonic()
    ((code, said),) = finish([hosts[1 - host]])
    assert code == 1
    assert "run the same command on all hosts to continue after the last commit" in said
    assert time.monotonic() - started < 60
    hosts[host].kill()
    assert len(list(out.glob("tpu_0/shard_*.json"))) < len(list(calm.glob("tpu_0/shard_*.json")))
    assert [code for code, _ in finish(start_slice(folder, out.name, 2))] == [0, 0]
    assert bytes_of(out) == bytes_of(calm)


def test_sigterm_to_one_host_stops_all_in_good_order(folder, calm):
    out = folder / "stopped"
    hosts = start_slice(folder, out.name, 2, stream="long.jsonl")
    deadline = time.monotonic() + 100
    while not (out / "tpu_0/shard_0001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    hosts[1].send_signal(signal.SIGTERM)
    ends = finish(hosts)
    assert [code for code, _ in ends] == [143, 143], ends
    committed = len(list(out.glob("tpu_0/shard_*.json")))
    assert committed >= 1
    verified = run("analyze_activations.py", "verify", out, "--allow_unfinished", cwd=folder)
    assert verified.returncode == 0, verified.stdout
    assert "shard_0001_part_0.pkl.gz" in bytes_of(out / "tpu_0")


def test_a_host_that_is_told_to_stop_and_hangs_ends_within_the_grace_too(folder):
    out = folder / "told"
    flags = ("--stop_grace_s", 3, "--host_timeout_s", 60)
    hosts = start_slice(folder, out.name, 2, *flags, stream="long.jsonl", host_0="encode.after@12=hang")
    deadline = time.monotonic() + 60
    while not (out / "tpu_0/shard_0001.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    hosts[1].send_signal(signal.SIGTERM)
    ends = finish(hosts)
    # Once the other host had been silent for the minute it would be 1.
    assert [code for code, _ in ends] == [143, 143], ends
    assert "another host is stopping" in ends[0][1]


def test_an_error_of_one_host_is_told_on_all(folder):
    ends = finish(start_slice(folder, "full", 2, host_1="store.before@3=full"))
    assert [code for code, _ in ends] == [1, 1]
    assert "No space left on device" in ends[1][1]
    assert re.search(r"host 1: .*No space left on device", ends[0][1])


def test_hosts_that_do_not_share_the_output_folder_are_refused(folder):
    disks = [folder / "disk_0", folder / "disk_1"]
    ends = finish(start_slice(folder, "out", 2, disks=disks))
    assert [code for code, _ in ends] == [1, 2]
    assert "host 1 does not see the files of host 0 there" in ends[1][1]
    assert "host 1 does not see the files" in ends[0][1]
    assert not [path for disk in disks for path in disk.glob("out/*")]


def test_hosts_that_were_started_with_other_flags_are_refused(folder):
    ends = finish(start_slice(folder, "flags_{host}", 2, "--checkpoint_dir", "{host}"))
    assert [code for code, _ in ends] == [1, 2]
    assert 'output_dir: "flags_0" on host 0, "flags_1" here' in ends[1][1]
    assert "checkpoint_dir" not in ends[1][1]
    assert not list(folder.glob("flags_*"))


def test_a_frozen_coordinator_is_noticed(folder):
    """It runs the service that the others ask."""
    hosts = start_slice(folder, "frozen", 2, host_0="store.before@2=stop")
    ((code, said),) = finish(hosts[1:])
    assert code == 1
    assert "host 0 has not responded for 10 s" in said


def test_a_slice_claims_shards_as_one_worker_and_sets_a_bad_one_aside(folder):
    lines = token_lines(60, longest=128)
    lines[33]["input_ids"] = [1] * 300
    write_jsonl(folder / "overlong.jsonl", lines)
    dataset = ("--dataset_name", "overlong.jsonl", "--sharded", "--num_shards", 3, "--output_dir", "dataset")
    assert run("create_dataset_streams.py", *dataset, cwd=folder).returncode == 0
    flags = ("--use_sharded_dataset", "--sharded_dataset_dir", "dataset", "--overlong", "refuse")
    ends = finish(start_slice(folder, "claimed", 2, *flags))
    assert [code for code, _ in ends] == [1, 1], ends
    assert "SET ASIDE shard_001" in ends[0][1]
    finished = {path.parent.name for path in (folder / "claimed").glob("shard_*/shard_0001_part_1.pkl.gz")}
    assert finished >= {"shard_000", "shard_002"}
    assert len(list((folder / "claimed/claims").glob("shard_000/*.json"))) == 1  # of one claimant
    assert run("analyze_activations.py", "verify", "claimed", "--allow_unfinished", cwd=folder).returncode == 0


def test_several_hosts_write_as_many_parts(folder, calm):
    ends = finish(start_slice(folder, "several", SEVERAL))
    assert [code for code, _ in ends] == [0] * SEVERAL, ends
    parts = {path.name.partition("_part_")[2] for path in (folder / "several/tpu_0").glob("shard_*_part_*")}
    assert parts == {f"{part}.pkl.gz" for part in range(SEVERAL)}
    assert activations(folder / "several").keys() == activations(calm).keys()
    assert verify(str(folder / "several")).ok


def test_a_shard_whose_data_fails_on_one_host_alone_is_set_aside(folder, tmp_path):
    """The other host has dropped its window by then, and misses no part of it."""
    write_model(tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.embed_tokens.weight"][319] *= 1e7
    save_file(weights, tmp_path / "model/model.safetensors")
    lines = [{"input_ids": [token % 319 for token in line["input_ids"]]} for line in token_lines(2000, longest=100)]
    lines[1600]["input_ids"] = [319] * 100
    write_jsonl(tmp_path / "large.jsonl", lines)
    dataset = ("--dataset_name", "large.jsonl", "--sharded", "--num_shards", 1, "--output_dir", "dataset")
    assert run("create_dataset_streams.py", *dataset, cwd=tmp_path).returncode == 0
    flags = ("--use_sharded_dataset", "--sharded_dataset_dir", "dataset", "--shard_size_gb", 1, "--batch_size", 1)
    ends = finish(start_slice(tmp_path, "out", 2, *flags))
    assert [code for code, _ in ends] == [1, 1]
    assert "SET ASIDE shard_000" in ends[0][1]
    assert len(list((tmp_path / "out/claims").glob("shard_000/0*.json"))) == 3  # leases


@pytest.mark.parametrize("lengths", [[100] * 4, [36, 36, 36, 108, 36, 36, 36], [10, 100, 36, 36, 36, 36, 36]])
def test_parts_without_a_sample_lose_nothing(folder, tmp_path, monkeypatch, lengths):
    stream = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": list(range(n))} for n in lengths])
    config = RunConfig(
        model_path=str(folder / "model"),
        dataset_path=str(stream),
        output_dir=str(tmp_path / "parts"),
        layers_to_extract=(1,),
        max_seq_length=128,
        shard_size_gb=2_200 / 2**30,
        enable_checkpointing=False,
    )
    assert run_job(replace(config, output_dir=str(tmp_path / "whole"))).samples == len(lengths)
    monkeypatch.setattr("core.run.checks._parts", lambda hosts, config: 3)
    assert price_run(replace(config, plan=True)).samples == len(lengths)
    assert run_job(config).samples == len(lengths)
    assert verify(config.output_dir).ok, verify(config.output_dir).lines()
    assert activations(tmp_path / "parts").keys() == activations(tmp_path / "whole").keys()


def test_hosts_reduce_their_own_rows_and_the_losses_are_those_of_all_parts(folder):
    reduction = ("--pool", "mean", "last", "--quantize", "int8", "--shard_size_gb", 1)
    assert [code for code, _ in finish(start_slice(folder, "reduced", 2, *reduction))] == [0, 0]
    arguments = ("--model_path", "model", "--dataset_path", "s.jsonl", *FLAGS, *reduction, "--output_dir", "one")
    assert run("extract_activations.py", *arguments, "--compilation_cache_dir", cache_dir(), cwd=folder).returncode == 0
    shared, alone = activations(folder / "reduced"), activations(folder / "one")
    assert shared.keys() == alone.keys()
    assert all(np.abs(shared[key].astype(int) - codes).max() <= 1 for key, codes in alone.items())
    found, wanted = (json.loads((folder / out / "tpu_0/metadata.json").read_text()) for out in ("reduced", "one"))
    for layer, losses in wanted["losses"]["residual"].items():
        assert found["losses"]["residual"][layer] == pytest.approx(losses, rel=1e-2)
    assert verify(str(folder / "reduced")).ok
