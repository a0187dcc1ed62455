"""A small dataset, fleets of workers over it, and what must hold of their output whatever happened to them."""

import gzip
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forks import Fork
from nursery import Nursery, Worker
from tiny_run import committed_files, token_lines, write_jsonl

from analysis.verification.verify import verify
from core.commit.record import CommitRecord
from core.streams.sharded_dataset import write_dataset

N_LINES, N_SHARDS = 60, 6
# Signs of life often enough that a dead worker is replaced within a second.
FLAGS = {
    "max_seq_length": 128,
    "shard_size_gb": 800 / 2**30,
    "claim_heartbeat_s": 0.1,
    "claim_ttl_s": 0.6,
    "batch_size": 1,
}


# Shards that take several chunks of an upload.
LARGE = {"dtype": "float32", "compress_shards": False, "shard_size_gb": 280_000 / 2**30}
LARGE_WIDTH, LARGE_LINES = 256, 150


def is_full() -> bool:
    """Whether the whole suite runs, or a quick selection of it."""
    return os.environ.get("FAULTS") == "all"


def counts(quick: int, full: int) -> range:
    """How often a fault is tried."""
    return range(full if is_full() else quick)


def sample(values: list[Any], quick: int) -> list[Any]:
    """All values in the full suite, some of them in the quick one; the same ones each time."""
    return values if is_full() or len(values) <= quick else random.Random(0).sample(values, quick)


def make_dataset(
    folder: Path, n_lines: int = N_LINES, n_shards: int = N_SHARDS, lines: list[dict[str, Any]] | None = None
) -> Path:
    """A sharded dataset of token ids, and a folder that stands for the model."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / "source.jsonl", lines or token_lines(n_lines, longest=30))
    write_dataset(source, n_lines, str(folder / "data"), num_shards=n_shards, chunk_size_mb=0.005)
    return folder / "data"


def flags(data: Path, out: object, worker: int = 0, **changes: Any) -> dict[str, Any]:
    """The flags of a worker over the dataset; checkpoints lie beside a local output, else beside the dataset."""
    beside = data.parent if str(out).startswith("gs://") else Path(str(out)).parent
    wanted = {
        "model_path": str(data.parent / "model"),
        "use_sharded_dataset": True,
        "sharded_dataset_dir": str(data),
        "output_dir": str(out),
        "worker_id": worker,
        "checkpoint_dir": str(beside / "checkpoints"),
    }
    return FLAGS | wanted | changes


def outputs(files: dict[str, bytes]) -> dict[str, bytes]:
    """What must not depend on who worked when: all but claims."""
    return {name: data for name, data in files.items() if not name.startswith("claims/")}


def leave_alone(out: Path) -> dict[str, bytes]:
    """The files of an output that do not depend on who worked when, those that a dead process was writing left out."""
    return {name: data for name, data in outputs(committed_files(out)).items() if ".tmp~" not in name}


def check_finished(out: Path, calm: dict[str, bytes], n_lines: int = N_LINES) -> None:
    """Every planned sample exactly once, all checksums valid, bytes equal to those of the undisturbed run."""
    report = verify(str(out))
    assert report.ok, report.lines()
    assert sum(folder.samples for folder in report.folders) == n_lines
    assert sample_indices(out) == list(range(n_lines))
    assert leave_alone(out) == calm


def sample_indices(out: Path) -> list[int]:
    """What the committed sample tables list, read without this project's readers."""
    found = []
    for path in sorted(out.glob("*/shard_[0-9]*.json")):
        (table,) = (file["name"] for file in json.loads(path.read_text())["files"] if file["site"] is None)
        rows = gzip.decompress((path.parent / table).read_bytes()).splitlines()
        found += [json.loads(row)["sample_idx"] for row in rows]
    return sorted(found)


def check_half_done(out: Path, calm: dict[str, bytes]) -> None:
    """At every moment: what is committed is what the undisturbed run has, and no checkpoint is ahead of it."""
    check_committed(out, calm)
    check_checkpoints(out)


def check_committed(out: Path, calm: dict[str, bytes]) -> None:
    """What a record names is what the undisturbed run has."""
    for path in out.glob("*/shard_[0-9]*.json"):
        name = str(path.relative_to(out))
        data = path.read_bytes()
        assert data == calm[name], name
        for file in CommitRecord.from_bytes(data).files:
            assert (path.parent / file.name).read_bytes() == calm[f"{path.parent.name}/{file.name}"], file.name


def check_checkpoints(out: Path) -> None:
    """No checkpoint says more than what is committed."""
    for path in (out.parent / "checkpoints").glob("checkpoint_worker_*.json"):
        checkpoint = json.loads(path.read_text())
        folder = out / Path(checkpoint["dataset_path"]).name
        records = [CommitRecord.from_bytes(record.read_bytes()) for record in folder.glob("shard_[0-9]*.json")]
        last = max((record.last_sample_idx for record in records), default=-1)
        assert checkpoint["total_shards"] <= len(records), path.name
        assert checkpoint["last_processed_sample_idx"] <= last, path.name


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Returns when `holds()`; fails when it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def start_fleet(nursery: Nursery, data: Path, out: object, n: int, **options: Any) -> list[Fork]:
    """`n` workers at once."""
    return [nursery.start(Worker(flags(data, out, number), **options)) for number in range(n)]
