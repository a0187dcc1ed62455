"""launchers/ray_job.py on a real Ray cluster of two nodes, with a tiny model: `make test-ray`."""

import importlib.util
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def script():
    spec = importlib.util.spec_from_file_location("ray_job", ROOT / "launchers/ray_job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_before_and_after_the_dashes():
    args = script().parse(["--workers", "2", "--resources", "TPU=4", "CPU=8", "--", "--use_sharded_dataset", "--json"])
    assert (args.workers, args.resources, args.flags) == (2, {"TPU": 4, "CPU": 8}, ["--use_sharded_dataset", "--json"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workers", "2"], "the workers divide a sharded dataset"),
        (["--workers", "0", "--", "--use_sharded_dataset"], "--workers must be above 0"),
        (["--workers", "1", "--resources", "TPU", "--", "--use_sharded_dataset"], "expected NAME=AMOUNT"),
    ],
)
def test_wrong_flags_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        script().parse(argv)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT}/tests")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "resources": {"TPU": 1}})
    found.doomed = found.add_node(num_cpus=1, resources={"TPU": 1})
    found.wait_for_nodes()
    yield found
    found.shutdown()


def flags(data: Path, out: Path) -> list[str]:
    from tiny_run import cache_dir

    named = {
        "model_path": data / "model",
        "sharded_dataset_dir": data / "dataset",
        "output_dir": out,
        "checkpoint_dir": out.with_suffix(".ck"),
        "compilation_cache_dir": cache_dir(),
        "claim_heartbeat_s": 0.5,
        "claim_ttl_s": 3,
        "shard_size_gb": 30_000 / 2**30,
        "max_seq_length": 64,
    }
    return ["--use_sharded_dataset", *(word for name, value in named.items() for word in (f"--{name}", str(value)))]


def shards_of(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("shard_*") if path.is_file() and "claims" not in path.parts)
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def test_a_node_that_dies_in_the_middle_leaves_the_bytes_of_one_worker(cluster, tmp_path):
    from tiny_run import token_lines, write_jsonl, write_model

    from create_dataset_streams import create_sharded_dataset

    write_model(tmp_path / "model", tokenizer=False)
    write_jsonl(tmp_path / "all.jsonl", token_lines(120, longest=60))
    create_sharded_dataset(str(tmp_path / "all.jsonl"), str(tmp_path / "dataset"), num_shards=8)
    alone = subprocess.run(
        [sys.executable, str(ROOT / "extract_activations.py"), *flags(tmp_path, tmp_path / "alone")],
        env=os.environ | {"WORKER_ID": "0"},
        check=False,
    )
    assert alone.returncode == 0
    out = tmp_path / "out"

    def kill() -> None:
        while len(list(out.glob("*/shard_*.json"))) < 2:
            time.sleep(0.02)
        cluster.remove_node(cluster.doomed, allow_graceful=False)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    argv = [sys.executable, str(ROOT / "launchers/ray_job.py"), "--ray_address", cluster.address, "--workers", "2"]
    argv += ["--resources", "TPU=1", "--", *flags(tmp_path, out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=200, check=False)
    thread.join()
    assert done.returncode == 0, done.stderr[-3000:]
    assert shards_of(out) == shards_of(tmp_path / "alone")
    assert done.stderr.count("ended with exit code 0") == 2
