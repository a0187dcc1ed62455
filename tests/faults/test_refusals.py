"""Another run in the same folder is refused by the name of what differs, and not a byte is written."""

import os
from pathlib import Path

import pytest
from fake_gcs import gcs_environment
from fleets import flags, make_dataset
from nursery import Worker
from tally import REFUSED
from tiny_run import token_lines, write_jsonl

from core.run.config import RunConfig

OTHER = {
    "model": ({}, {"weights": 1}, "model.digest"),
    "model size": ({}, {"width": 16}, "model.digest"),
    "layers": ({"layers_to_extract": (1,)}, {}, "layers"),
    "site": ({"activation_type": ("mlp",)}, {}, "sites"),
    "dtype": ({"dtype": "float32"}, {}, "dtype"),
    "format": ({"format": "safetensors"}, {}, "format"),
    "compression": ({"compress_shards": False}, {}, "compress"),
    "shard size": ({"shard_size_gb": 900 / 2**30}, {}, "shard_bytes"),
    "sample length": ({"max_seq_length": 256}, {}, "max_seq_length"),
    "overlong": ({"overlong": "refuse"}, {}, "overlong"),
    "tokens": ({"positions": ("0:4",)}, {}, "selection"),
    "prompt version": ({"prompt_version": "output-from-examples-v1"}, {}, "prompts.prompt_version"),
    "prompt encoder": ({"grid_encoder": "MinimalGridEncoder()"}, {}, "prompts.grid_encoder"),
    "prompts of a task": ({"predictions_per_task": 2}, {}, "prompts.predictions_per_task"),
    "seed of prompts": ({"random_seed": 7}, {}, "prompts.random_seed"),
    "part of the data": ({"max_tasks": 3}, {}, "max_tasks"),
}


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file and folder below, with content and time of its last change."""
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", os.stat(path).st_mtime_ns)
        for path in folder.rglob("*")
    }


def streams(data: Path) -> dict[str, object]:
    """Flags that make a run over one shard as a plain stream."""
    return {"use_sharded_dataset": False, "sharded_dataset_dir": None, "dataset_path": str(data / "shard_000")}


@pytest.mark.parametrize("kind", ["shards", "a stream"])
def test_another_run_in_the_same_folder_is_refused_and_writes_nothing(kind, nursery, place, tally):
    data = make_dataset(place, 12, 2)
    base = flags(data, place / "out") | (streams(data) if kind == "a stream" else {})
    nursery.start(Worker(base)).finish()
    before = everything(place)
    others = [nursery.start(Worker(base | changed, **options)) for changed, options, _ in OTHER.values()]
    for worker, (name, (_, _, field)) in zip(others, OTHER.items(), strict=True):
        assert worker.wait() == 2, (name, worker.errors)
        assert field in worker.errors, (name, worker.errors)
        assert "belongs to another run" in worker.errors
    assert everything(place) == before
    tally(REFUSED, len(OTHER))


def test_another_dataset_is_refused_and_writes_nothing(nursery, place, tally):
    data = make_dataset(place, 12, 2)
    nursery.start(Worker(flags(data, place / "out"))).finish()
    (place / "other").mkdir()
    other = make_dataset(place / "other", lines=token_lines(12, seed=5, longest=30), n_lines=12, n_shards=2)
    before = everything(place)
    refused = nursery.start(Worker(flags(other, place / "out")))
    assert refused.wait() == 2
    assert "crc32c" in refused.errors
    assert everything(place) == before
    tally(REFUSED)


def test_another_run_in_a_bucket_is_refused_and_writes_nothing(nursery, place, bucket, tally):
    data = make_dataset(place, 12, 2)
    environment = {"environment": gcs_environment(bucket)}
    nursery.start(Worker(flags(data, "gs://bucket/out"), **environment)).finish()
    before, calls = bucket.objects(), len(bucket.requests)
    others = list(OTHER.values())[:5]
    for changed, options, _ in others:
        refused = nursery.start(Worker(flags(data, "gs://bucket/out") | changed, **environment, **options))
        assert refused.wait() == 2, refused.errors
    assert bucket.objects() == before
    assert {request.method for request in bucket.requests[calls:]} == {"GET"}
    tally(REFUSED, len(others))


def test_what_does_not_decide_the_bytes_is_not_refused(nursery, place):
    data = make_dataset(place, 12, 2)
    write_jsonl(place / "unused.jsonl", token_lines(1))
    nursery.start(Worker(flags(data, place / "out"))).finish()
    for harmless in ({"worker_id": 9}, {"claim_ttl_s": 5.0}, {"max_bad_records": 3}, {"stop_grace_s": 1.0}):
        assert nursery.start(Worker(flags(data, place / "out") | harmless)).finish()["samples"] == 0


def test_the_nursery_runs_what_the_command_runs(nursery, calm, place):
    """The light model changes the activations and nothing else: errors and exit codes are those of the command."""
    data, _ = calm
    wrong = nursery.start(Worker(flags(data, place / "out", batch_size=0)))
    assert wrong.wait() == 2
    assert "error: --batch_size 0" in wrong.errors
    assert RunConfig(dataset_path="x").batch_size == 4
