"""`verify` on a committed run that is damaged in every way a disk or a bug can damage it."""

import gzip
import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from resealing import write_and_reseal
from tiny_run import cache_dir, token_lines, write_jsonl, write_model

from analysis.passes import PartialStore, RunnerChoice
from analysis.verification.verify import verify
from analysis.verification.window_checks import check_window
from core.base.canonical_json import read_sealed_json, sealed_json
from core.base.errors import RunError, UsageError
from core.commit.record import CommitRecord
from core.object_store import LocalStore
from core.object_store.generic import FsspecStore
from core.run.config import RunConfig
from core.run.runner import run
from core.shards.formats import FORMATS


@pytest.fixture(scope="module", params=FORMATS)
def pristine(request, tmp_path_factory) -> Path:
    """About four windows of 20 samples, two sites."""
    folder = tmp_path_factory.mktemp("pristine")
    write_model(folder / "model", tokenizer=False)
    write_jsonl(folder / "s.jsonl", token_lines(20, longest=100))
    run(config(folder, request.param, folder / "out"))
    return folder / "out"


def config(folder: Path, format_name: str, out: Path) -> RunConfig:
    return RunConfig(
        model_path=str(folder / "model"),
        dataset_path=str(folder / "s.jsonl"),
        output_dir=str(out),
        checkpoint_dir=str(folder / "ck"),
        compilation_cache_dir=cache_dir(),
        shard_size_gb=50_000 / 2**30,
        max_seq_length=128,
        activation_type=("residual", "mlp"),
        format=format_name,
    )


@pytest.fixture
def out(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "out"))


def problems(out: Path) -> list[str]:
    report = verify(str(out))
    assert report.ok == (not report.problems and not any(folder.problems for folder in report.folders))
    return [*report.problems, *(problem for folder in report.folders for problem in folder.problems)]


def rewrite_record(out: Path, window: int, /, **changes) -> None:
    path = out / f"tpu_0/shard_{window:04d}.json"
    path.write_bytes(sealed_json(read_sealed_json(path.read_bytes()) | changes))


def test_an_undisturbed_run_has_no_problem_at_the_root_and_in_its_folder(out):
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
    assert any(
        "not finished: run the same extraction again to continue at sample" in problem for problem in problems(out)
    )
    allowed = verify(str(out), allow_unfinished=True)
    assert allowed.ok
    assert any("without a record" in warning for warning in allowed.folders[0].warnings)


def test_windows_that_skip_or_repeat_samples_are_found(out):
    first = record_of(out / "tpu_0/shard_0001.json")
    rewrite_record(out, 2, bad_records=[{"position": 0, "line": 1, "reason": "made up"}])
    assert any("instead of" in problem for problem in problems(out))
    rewrite_record(out, 2, bad_records=[])
    rewrite_record(out, 1, n_samples=first.n_samples + 1)
    assert any(", the record " in problem for problem in problems(out))


def test_nan_and_wrong_shapes_inside_a_valid_file_are_found(out):
    paths = sorted(out.glob("tpu_0/mlp/shard_0001.pkl.gz"))
    if not paths:
        pytest.skip("the damage is made in pickle shards")
    (path,) = paths
    whole = path.read_bytes()

    def damaged(change) -> list[str]:
        shard = pickle.loads(gzip.decompress(whole))
        change(shard)
        write_and_reseal(path, gzip.compress(pickle.dumps(shard)), path.parents[1])
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

    assert any("layer 1, sample 0: it contains NaN" in problem for problem in damaged(nan))
    assert any("layer 1, sample 0: shape" in problem for problem in damaged(short))
    assert any("it has layers [0, 1]" in problem for problem in damaged(lost_layer))
    assert any("layer 0, sample 1: dtype float32" in problem for problem in damaged(wider))


def test_a_folder_without_a_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no run here"):
        verify(str(tmp_path))


NOT_OBJECTS = [b"[]", b"[1, 2]", b"null", b'"x"', b"7", b"{", b"\xff\xfe", b""]


@pytest.mark.parametrize("name", ["run.json", "tpu_0/stream.json", "tpu_0/shard_0002.json", "dataset.json"])
@pytest.mark.parametrize("data", NOT_OBJECTS)
def test_json_that_is_no_object_is_a_problem_that_names_the_file(out, name, data):
    (out / name).write_bytes(data)
    assert any(name in problem for problem in problems(out))


@pytest.mark.parametrize("data", NOT_OBJECTS)
def test_an_index_that_is_no_object_is_a_note_for_it_is_rebuilt(out, data):
    (out / "tpu_0/metadata.json").write_bytes(data)
    report = verify(str(out))
    assert report.ok
    assert any("metadata.json" in warning for warning in report.folders[0].warnings)


@pytest.mark.parametrize("wrong", [None, True, -1, "x", [], ["x"], {}, {"x": []}])
@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("run.json", "format"),
        ("tpu_0/stream.json", "identity"),
        ("tpu_0/stream.json", "machine_id"),
        ("tpu_0/stream.json", "total_machines"),
        ("tpu_0/stream.json", "max_tasks"),
        ("tpu_0/stream.json", "first_position"),
        ("dataset.json", "shards"),
    ],
)
def test_a_field_of_another_type_is_a_problem_and_no_trace(out, name, field, wrong):
    path = out / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {field: wrong}))
    if (field, wrong) not in [("max_tasks", None), ("shards", {})]:
        assert problems(out)


@pytest.mark.parametrize("wrong", [None, True, -1, "x", [], ["x"], [{}], [{"position": "x"}], {}, {"x": []}])
def test_no_field_of_a_record_can_make_a_trace(out, wrong):
    whole = (out / "tpu_0/shard_0002.json").read_text()
    for field in json.loads(whole):
        rewrite_record(out, 2, **{field: wrong})
        verify(str(out))
        (out / "tpu_0/shard_0002.json").write_text(whole)
    fields = json.loads(whole)
    for field in fields["files"][0]:
        rewrite_record(out, 2, files=[fields["files"][0] | {field: wrong}, *fields["files"][1:]])
        assert problems(out), field
    rewrite_record(out, 2, samples_per_record=0)
    assert any("shard_0002.json" in problem for problem in problems(out))


def test_a_folder_whose_stream_file_is_lost_is_not_passed_over(out):
    (out / "tpu_0/stream.json").rename(out / "stream.txt")
    assert any("tpu_0/stream.json is missing" in problem for problem in problems(out))


def test_a_wrong_line_in_a_sample_table_is_found(out):
    table = out / "tpu_0/samples_0001.jsonl.gz"
    lines = gzip.decompress(table.read_bytes()).splitlines()
    write_and_reseal(table, gzip.compress(b"\n".join([*lines[:-1], b"[1]"])), out / "tpu_0")
    assert any(f"samples_0001.jsonl.gz: cannot be read: line {len(lines)}" in problem for problem in problems(out))


def test_a_file_that_may_not_be_read_is_one_problem(out, monkeypatch):
    """Tests may run as root, whom no permission bits stop."""
    for name in ("run.json", "tpu_0/stream.json", "tpu_0/shard_0001.json", "tpu_0/samples_0001.jsonl.gz"):
        with monkeypatch.context() as patch:
            for method in ("read_bytes", "open"):
                patch.setattr(LocalStore, method, refusing(getattr(LocalStore, method), name))
            assert any(name.split("/")[-1] in p and "Permission denied" in p for p in problems(out)), name


def refusing(method, forbidden: str):
    def read(store, name):
        if name == forbidden:
            raise PermissionError(13, "Permission denied", f"{store.url}/{name}")
        return method(store, name)

    return read


def test_a_file_in_place_of_a_folder_and_a_folder_that_cannot_be_listed_are_one_line_each(out, monkeypatch):
    with pytest.raises(UsageError, match="no run here"):
        verify(str(out / "run.json"))

    def refuse(store, prefix=""):
        raise PermissionError(13, "Permission denied", store.url)

    monkeypatch.setattr(LocalStore, "list", refuse)
    with pytest.raises(RunError, match="cannot be listed: Permission denied"):
        verify(str(out))


def test_a_missing_or_damaged_file_comes_with_what_mends_it(out):
    mend = "remove shard_0002.json and the files it names, then run the same extraction again"
    table = out / "tpu_0/samples_0002.jsonl.gz"
    table.write_bytes(table.read_bytes()[:-1])
    (shard,) = (out / "tpu_0/residual").glob("shard_0002.*")
    shard.unlink()
    found = problems(out)
    assert any(problem.startswith("window 2: samples_0002.jsonl.gz: bytes") and mend in problem for problem in found)
    assert any(
        problem.startswith(f"window 2: residual/{shard.name} is missing") and mend in problem for problem in found
    )


def test_what_mends_a_damaged_window_does_mend_it(pristine, out):
    record = record_of(out / "tpu_0/shard_0002.json")
    whole = {path.name: path.read_bytes() for path in (out / "tpu_0").rglob("*_0002.*")}
    for name in ["shard_0002.json", *(file.name for file in record.files)]:
        (out / "tpu_0" / name).unlink()
    run(config(pristine.parent, json.loads((out / "run.json").read_text())["format"], out))
    assert problems(out) == []
    assert {path.name: path.read_bytes() for path in (out / "tpu_0").rglob("*_0002.*")} == whole


def test_shards_on_a_disk_are_neither_read_whole_nor_copied(out, monkeypatch):
    def records_alone(store, name):
        assert name.endswith(".json"), name
        return (store.root / name).read_bytes()

    monkeypatch.setattr(LocalStore, "read_bytes", records_alone)
    monkeypatch.delattr("tempfile.SpooledTemporaryFile")
    assert problems(out) == []


class Counted(io.BytesIO):
    """A remote object that counts what is taken from it."""

    def __init__(self, data: bytes, taken: list[int]) -> None:
        super().__init__(data)
        self.taken = taken

    def read(self, size=-1):
        data = super().read(size)
        self.taken.append(len(data))
        return data


def test_an_output_behind_a_url_is_downloaded_once_and_in_pieces(out, tmp_path, monkeypatch):
    import fsspec

    fs = fsspec.filesystem("memory")
    root = f"/{tmp_path.name}"
    fs.put(str(out), root, recursive=True)
    taken: dict[str, list[int]] = {}

    def counting(store, name):
        return Counted(store.read_bytes(name), taken.setdefault(name, []))

    monkeypatch.setattr(FsspecStore, "open", counting)
    monkeypatch.setattr("analysis.verification.window_checks._COPY_BYTES", 1000)
    monkeypatch.setattr("analysis.verification.window_checks._SPOOL_BYTES", 5000)
    report = verify(f"memory:/{root}")
    assert report.ok, report.lines()
    sizes = {file.name: file.bytes for path in out.glob("tpu_0/shard_*.json") for file in record_of(path).files}
    assert {name.removeprefix("tpu_0/"): sum(reads) for name, reads in taken.items()} == sizes
    assert max(max(reads) for reads in taken.values()) <= 1000
    damaged = f"{root}/tpu_0/samples_0001.jsonl.gz"
    fs.pipe_file(damaged, fs.cat_file(damaged)[:-1])
    assert any("samples_0001" in problem for problem in problems(f"memory:/{root}"))
    fs.rm(root, recursive=True)


def test_an_interrupted_verification_goes_on_with_the_same_report(out, tmp_path, monkeypatch):
    whole, store = verify(str(out)), PartialStore(str(tmp_path / "partials"))
    checked: list[int] = []

    def counting(root, folder, record, format_name):
        checked.append(record.window)
        if record.window == 3 and checked.count(3) == 1:
            raise KeyboardInterrupt
        return check_window(root, folder, record, format_name)

    monkeypatch.setattr("analysis.verification.windows_pass.check_window", counting)
    with pytest.raises(KeyboardInterrupt):
        verify(str(out), runner=RunnerChoice("local"), partials=store)
    assert verify(str(out), runner=RunnerChoice("threads", 3), partials=store) == whole
    assert [checked.count(window) for window in (1, 2, 3, 4)] == [1, 1, 2, 1]
    assert not (tmp_path / "partials").exists()
