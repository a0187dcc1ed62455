"""The same command with the real gcloud SDK, whose calls end at a TPU API on loopback."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fleet_commands import Fleet
from tpu_api import serve

A, B = "us-central1-a", "us-central1-b"
GCLOUD = shutil.which("gcloud")
pytestmark = pytest.mark.skipif(GCLOUD is None, reason="the Google Cloud SDK is not installed")


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    """gcloud's own folder, shared because it takes gcloud a second to fill."""
    return tmp_path_factory.mktemp("gcloud")


@pytest.fixture
def real(tpus, configuration):
    """Commands with the real gcloud, without credentials."""
    with serve(tpus) as url:
        environment = os.environ | {
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "1",
            "CLOUDSDK_CORE_PROJECT": "p",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{url}compute/v1/",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
            "CLOUDSDK_CONFIG": str(configuration),
            "PYTHON": sys.executable,
        }
        yield Fleet(tpus, environment)


def test_one_run_creates_recreates_and_leaves_alone_and_a_second_does_nothing(real, tpus):
    names = [f"activations-{A}-{i}" for i in range(3)]
    tpus.put(A, names[1], "PREEMPTED")
    tpus.put(A, names[2], "PREEMPTED", labels={"team": "other"})
    flags = ("--zones", A, "--workers_per_zone", "3", "--tpu_type", "v5litepod-64", "--on-demand")
    done = real("create", *flags)
    assert (done.returncode, "conflict" in done.stderr) == (1, True), done.stderr
    assert tpus.nodes() == dict(zip([f"{A}/{name}" for name in names], ["READY", "READY", "PREEMPTED"], strict=True))
    assert tpus.calls("delete") == [f"delete {A} {names[1]}"]
    for worker, name in enumerate(names[:2]):
        node = tpus.node(f"{A}/{name}")
        kind = (node["acceleratorType"], node["runtimeVersion"], node["schedulingConfig"]["spot"])
        assert kind == ("v5litepod-64", "v2-alpha-tpuv5-lite", False)
        assert node["labels"] == {"activations-fleet": "activations", "activations-worker": str(worker)}
    real("create", *flags)
    assert len(tpus.calls("create", "delete")) == 3


def test_queued_resources(real, tpus):
    name = f"activations-{A}-0"
    asked = real("create", "--zones", A, "--queued")
    assert asked.returncode == 0, asked.stderr
    with tpus.state() as state:
        record = state["queuedResources"][f"{A}/{name}"]
        spec = record["tpu"]["nodeSpec"][0]
        assert (spec["nodeId"], record["spot"]) == (name, {})
        assert spec["node"]["labels"]["activations-fleet"] == "activations"
        record["state"]["state"] = "SUSPENDED"
    again = real("recreate-preempted", "--zones", A)
    assert again.returncode == 0, again.stderr
    assert tpus.queue() == {f"{A}/{name}": "ACCEPTED"}
    assert tpus.calls("delete", "create") == [f"{verb} {A} {name}" for verb in ("create", "delete", "create")]


def test_a_stockout_in_one_zone_does_not_stop_the_other(real, tpus):
    tpus.fail("create", "stockout", zone=B)
    done = real("create", "--zones", f"{A},{B}", "--max_retries", "0")
    assert (done.returncode, tpus.nodes()) == (1, {f"{A}/activations-{A}-0": "READY"})
    assert f"activations-{B}-0 (worker 1" in done.stderr
    assert "no capacity" in done.stderr


def test_an_answer_of_the_api_that_is_no_json_changes_nothing(real, tpus):
    tpus.put(A, f"activations-{A}-0", "PREEMPTED")
    tpus.fail("list", "garbage", times=99, zone=B)
    assert real("create", "--zones", f"{A},{B}", "--max_retries", "0").returncode == 1
    assert tpus.calls("create", "delete") == []


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh is not installed")
def test_launch_reaches_every_host_of_a_slice(real, tpus, tmp_path):
    """What `launch --dry-run` prints is given to the real gcloud, which prints the ssh and scp that it would run."""
    name = f"activations-{A}-0"
    hosts = [{"ipAddress": f"10.0.0.{i}", "accessConfig": {"externalIp": f"192.0.2.{i}"}} for i in range(4)]
    tpus.put(A, name, "READY", acceleratorType="v5litepod-16", networkEndpoints=hosts)
    planned = real("launch", "--zones", A, "--dry-run", "--", "--grid_encoder", "GridShapeEncoder(x)").stderr
    calls = re.findall(r"(?s)would run: gcloud (.*?)(?=\n\d\d:\d\d:\d\d |\Z)", planned)
    copied, started = [run_dry(shlex.split(call), tmp_path, real.environment) for call in calls]
    everywhere = [str(i) for i in range(4)]
    assert re.findall(r"(?m)^\S*scp \S+ \S+@192\.0\.2\.(\d):activations-\w+\.tar\.gz$", copied) == everywhere
    assert re.findall(r"(?m)^\S*ssh -T \S+@192\.0\.2\.(\d) -- set -eu$", started) == everywhere
    assert started.count("--grid_encoder 'GridShapeEncoder(x)' --multihost --worker_id 0\n") == 4


def run_dry(words: list[str], home: Path, environment: dict[str, str]) -> str:
    """What gcloud would run on each host."""
    key = home / ".ssh/google_compute_engine"
    if not key.exists():
        key.parent.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-N", "", "-f", key], check=True)
    call = [str(GCLOUD), *words, "--dry-run", "--plain"]
    done = subprocess.run(call, env=environment | {"HOME": str(home)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
