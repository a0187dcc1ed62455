"""A real Ray cluster of two nodes on this machine: the bits of one process, also when a node dies. `make test-ray`."""

import threading
import time
from pathlib import Path

import pytest
from light_passes import MatrixSum

pytest.importorskip("ray", reason="Ray is not installed: make test-ray")

from analysis.passes import PartialStore, RunnerChoice, run_pass
from analysis.stats import PassOptions, StatsRequest, drop_rules, stats
from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import RunError

PARTS = list(range(24))
ROOT = Path(__file__).parents[3]


@pytest.fixture
def cluster(monkeypatch):
    """Two nodes of a core each; the test connects to it."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.fixture(scope="module")
def expected() -> bytes:
    return run_pass(MatrixSum(), PARTS)


def logged(folder: Path, **more) -> MatrixSum:
    folder.mkdir()
    return MatrixSum(log=str(folder), **more)


def test_two_nodes_give_the_bits_of_one_process_and_one_bad_part_its_line(cluster, expected, tmp_path):
    choice = RunnerChoice("ray", ray_address=cluster.address)
    a_pass = logged(tmp_path / "log")
    assert run_pass(a_pass, PARTS, runner=choice, block=2) == expected
    assert a_pass.mapped() == PARTS
    assert len({path.name.split("-")[1] for path in (tmp_path / "log").iterdir()}) >= 2
    bad = logged(tmp_path / "bad", bad=3)
    with pytest.raises(RunError, match=r"^out/part_3 cannot be read: inspect it$"):
        run_pass(bad, list(range(200)), runner=choice)
    assert len(bad.mapped()) < 20


@pytest.mark.parametrize("keeps_partials", [False, True])
def test_a_node_that_is_killed_in_the_middle_changes_nothing(cluster, expected, tmp_path, keeps_partials):
    a_pass = logged(tmp_path / "log", slow_s=3.0, pause_s=0.3)
    doomed = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    killed = threading.Event()

    def kill() -> None:
        while len(a_pass.mapped()) < 8:
            time.sleep(0.05)
        cluster.remove_node(doomed, allow_graceful=False)
        killed.set()

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    partials = PartialStore(str(tmp_path / "analysis")) if keeps_partials else None
    choice = RunnerChoice("ray", ray_address=cluster.address)
    assert run_pass(a_pass, PARTS, runner=choice, partials=partials) == expected
    thread.join()
    assert killed.is_set()
    assert set(a_pass.mapped()) == set(PARTS)


def test_a_cluster_that_is_not_there_is_one_line():
    with pytest.raises(RunError, match=r"^--ray_address 127.0.0.1:1: "):
        run_pass(MatrixSum(), PARTS, runner=RunnerChoice("ray", ray_address="127.0.0.1:1"))


def test_statistics_on_the_cluster_have_the_bytes_of_one_process(cluster, tmp_path):
    run = SyntheticRun({"mlp": ((0, 2), 64)}, shard_format="safetensors", dtype="float16")
    write_run(tmp_path / "out", run, [[200, 60]] * 9)
    request = StatsRequest(drop=drop_rules(None))
    for name, options in (("one.npz", PassOptions()), ("ray.npz", PassOptions(ray_address=cluster.address))):
        stats(str(tmp_path / "out"), request, options, str(tmp_path / name))
    assert (tmp_path / "ray.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert not (tmp_path / "out/analysis").exists()
