"""`verify` on a committed run that is damaged in every way a disk or a bug can damage it."""

import gzip
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import cache_dir, token_lines, write_jsonl, write_model

from analysis.verification import verify
from core.activation_storage import CommitRecord
from core.errors import UsageError
from core.run_config import RunConfig
from core.runner import run
from core.sinks import digest_stream


@pytest.fixture(scope="module", params=["pickle", "safetensors"])
def pristine(request, tmp_path_factory) -> Path:
    """About four windows of 20 samples, two sites."""
    folder = tmp_path_factory.mktemp("pristine")
    run(
        RunConfig(
            model_path=str(write_model(folder / "model", tokenizer=False)),
            dataset_path=str(write_jsonl(folder / "s.jsonl", token_lines(20, longest=100))),
            output_dir=str(folder / "out"),
            checkpoint_dir=str(folder / "ck"),
            compilation_cache_dir=cache_dir(),
            shard_size_gb=50_000 / 2**30,
            max_seq_length=128,
            activation_type=("residual", "mlp"),
            format=request.param,
        )
    )
    return folder / "out"


@pytest.fixture
def out(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def problems(out: Path) -> list[str]:
    return [problem for folder in verify(str(out)).folders for problem in folder.problems]


def rewrite_record(out: Path, window: int, **changes) -> None:
    path = out / f"tpu_0/shard_{window:04d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replace_data(path: Path, data: bytes) -> None:
    """Writes other content and makes the record agree with it, as a bug in the writer would."""
    path.write_bytes(data)
    record_path = next(r for r in path.parents[1].glob("shard_*.json") if r.stem[-4:] == path.name[6:10])
    fields = json.loads(record_path.read_text())
    with path.open("rb") as stream:
        digest = digest_stream(stream)
    for file in fields["files"]:
        if file["name"] == f"{path.parent.name}/{path.name}":
            file |= {"bytes": digest.bytes, "crc32c": digest.crc32c, "sha256": digest.sha256}
    record_path.write_text(json.dumps(fields))


def test_a_calm_run_has_no_problem_at_the_root_and_in_its_folder(out):
    report = verify(str(out))
    assert report.ok
    (folder,) = report.folders
    assert (folder.samples, folder.complete, folder.warnings) == (20, True, [])
    assert folder.shards >= 4
    assert verify(str(out / "tpu_0")).ok


def test_one_flipped_or_lost_byte_in_any_named_file_is_found_and_named(out):
    names = [file.name for path in out.glob("tpu_0/shard_*.json") for file in record_of(path).files]
    assert len(names) >= 12
    rng = np.random.default_rng(0)
    for name in names:
        path = out / "tpu_0" / name
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        for damaged in (bytes(flipped), whole[:-1], b""):
            path.write_bytes(damaged)
            assert any(name in problem for problem in problems(out)), name
        path.unlink()
        assert any(f"{name} is missing" in problem for problem in problems(out))
        path.write_bytes(whole)
    assert problems(out) == []


def record_of(path: Path) -> CommitRecord:
    return CommitRecord.from_bytes(path.read_bytes())


def test_a_damaged_record_or_plan_is_found(out):
    for name in ("run.json", "tpu_0/stream.json", "tpu_0/shard_0002.json"):
        path = out / name
        whole = path.read_bytes()
        path.write_bytes(whole.replace(b"1", b"2", 1))
        assert problems(out), name
        path.write_bytes(whole)
    (out / "tpu_0/shard_0002.json").unlink()
    assert any("window 2 has no commit record" in problem for problem in problems(out))


def test_a_missing_tail_is_unfinished_and_only_a_note_when_that_is_allowed(out):
    last = sorted((out / "tpu_0").glob("shard_*.json"))[-1]
    last.unlink()
    assert any("not finished: the run goes on at sample" in problem for problem in problems(out))
    allowed = verify(str(out), allow_unfinished=True)
    assert allowed.ok
    assert any("that no record names" in warning for warning in allowed.folders[0].warnings)


def test_windows_that_skip_or_repeat_samples_are_found(out):
    first = record_of(out / "tpu_0/shard_0001.json")
    rewrite_record(out, 2, bad_records=[{"position": 0, "line": 1, "reason": "made up"}])
    assert any("stands where sample" in problem for problem in problems(out))
    rewrite_record(out, 2, bad_records=[])
    rewrite_record(out, 1, n_samples=first.n_samples + 1)
    assert any("the record says" in problem for problem in problems(out))


def test_nan_and_wrong_shapes_inside_a_valid_file_are_found(out):
    paths = sorted(out.glob("tpu_0/mlp/shard_0001.pkl.gz"))
    if not paths:
        pytest.skip("the damage is made in pickle shards")
    (path,) = paths
    whole = path.read_bytes()

    def damaged(change) -> list[str]:
        shard = pickle.loads(gzip.decompress(whole))
        change(shard)
        replace_data(path, gzip.compress(pickle.dumps(shard)))
        return problems(out)

    def nan(shard):
        shard[1][0]["activation"][0, 0] = np.nan

    def short(shard):
        shard[1][0]["activation"] = shard[1][0]["activation"][:-1]
        shard[1][0]["shape"] = shard[1][0]["activation"].shape

    def lost_layer(shard):
        del shard[2]

    def wider(shard):
        shard[0][1]["activation"] = shard[0][1]["activation"].astype(np.float32)

    assert any("layer 1, sample 0: it holds NaN" in problem for problem in damaged(nan))
    assert any("layer 1, sample 0: shape" in problem for problem in damaged(short))
    assert any("it holds layers [0, 1]" in problem for problem in damaged(lost_layer))
    assert any("layer 0, sample 1: dtype float32" in problem for problem in damaged(wider))


def test_a_folder_without_a_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no run here"):
        verify(str(tmp_path))
