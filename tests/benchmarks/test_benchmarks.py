"""The benchmarks run at a tiny size, and their numbers add up."""

import gzip
import json
import pickle
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from statistics import median
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tiny_run import D_MODEL, arc_lines, write_jsonl, write_model

from benchmarks import generation, parquet, quantization, start, utilisation
from benchmarks.common import engine as common_engine
from benchmarks.common.engine import Engine
from benchmarks.common.measuring import Ratio, Timings, alternate
from benchmarks.common.workload import LONGEST, SHORTEST, Workload, build_workload
from benchmarks.peers import benchmark as peers
from benchmarks.peers.agreement import read_shards, worst_disagreement
from benchmarks.peers.peer_sides import Request
from benchmarks.storage import benchmark as storage
from benchmarks.storage import codecs, layouts
from core.base.errors import RunError, UsageError
from core.object_store.stored_files import read_jsonl_lines
from core.step.backend import StepOutput

PROMPTS = 6


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[str, str]:
    """A tiny model folder and a file of tasks."""
    folder = tmp_path_factory.mktemp("source")
    return str(write_model(folder / "model")), str(write_jsonl(folder / "tasks.jsonl", arc_lines(9)))


@pytest.fixture(scope="module")
def workload(source, tmp_path_factory) -> Workload:
    model, tasks = source
    return build_workload(tmp_path_factory.mktemp("workload"), prompts=PROMPTS, seed=0, source=tasks, model_path=model)


def result_of(module: ModuleType, source: tuple[str, str], capsys: pytest.CaptureFixture[str], *flags: str) -> dict:
    model, tasks = source
    argv = ["--model_path", model, "--source", tasks, "--prompts", str(PROMPTS), "--json", *flags]
    module.run(module.build_parser().parse_args(argv))
    return json.loads(capsys.readouterr().out)


def tokens_of(stream: Path, model_path: str) -> list[list[int]]:
    engine = peers.Engine.load(model_path, stream, layers=[0], dtype="float32", batch_size=4, shard_mb=1)
    return [sample.token_ids.tolist() for window in engine.job.windows() for sample in window.samples]


def test_both_streams_of_the_workload_give_the_same_tokens(workload):
    given = [json.loads(line)["input_ids"] for line in read_jsonl_lines(str(workload.token_stream))]
    assert given == tokens_of(workload.arc_stream, workload.model_path)
    assert given == tokens_of(workload.token_stream, workload.model_path)
    assert workload.lengths == [len(ids) for ids in given]
    assert len(set(workload.lengths)) > 1
    assert all(SHORTEST <= length <= LONGEST for length in workload.lengths)


def test_the_seed_chooses_the_prompts_and_too_many_are_refused(source, workload, tmp_path):
    model, tasks = source
    again, other = (
        build_workload(tmp_path / str(seed), prompts=PROMPTS, seed=seed, source=tasks, model_path=model)
        for seed in (0, 1)
    )
    assert again.arc_stream.read_bytes() == workload.arc_stream.read_bytes() != other.arc_stream.read_bytes()
    with pytest.raises(UsageError, match=r"--prompts 10: .* has 9 prompts of 170 to 2000 tokens"):
        build_workload(tmp_path / "many", prompts=10, seed=0, source=tasks, model_path=model)


@pytest.mark.benchmark
@pytest.mark.parametrize(("case", "n_layers"), [("middle", 1), ("all", 3)])
def test_utilisation_compares_the_same_steps_over_several_windows(case, n_layers, source, workload, capsys):
    result = result_of(utilisation, source, capsys, "--cases", case, "--windows", "3", "--repeats", "3")
    (found,) = result["cases"]
    assert found["n_layers"] == n_layers
    assert found["shards"] >= 3
    assert found["tokens"] == workload.n_tokens <= found["computed_tokens"]
    assert found["ratio"]["median"] == pytest.approx(
        median(found["timings"]["end_to_end"]["wall"]) / median(found["timings"]["forward"]["wall"]), abs=1e-3
    )
    assert set(found["stages"]) == {"read", "forward", "copy", "encode", "store"}
    assert result["machine"]["cores"] >= 1


@pytest.mark.benchmark
def test_peers_agree_and_the_ratio_is_that_of_tokens_per_second(source, workload, capsys):
    names = ("hf", "hf_sorted", "hf_cut")
    # One thread: those of torch wait for each other actively, which costs seconds on a busy machine.
    flags = ["--shard_mb", "0.5", "--batch_size", "2", "--threads", "1", "--repeats", "1"]
    result = result_of(peers, source, capsys, "--peers", *names, *flags)
    middle, every = result["cases"]
    assert [row["peer"] for row in middle["peers"]] == ["hf", "hf_sorted", "hf_cut"]
    assert [row["peer"] for row in every["peers"]] == ["hf", "hf_sorted"]
    in_order, by_length = workload.lengths, sorted(workload.lengths)
    for found in (middle, every):
        assert found["tokens"] == workload.n_tokens
        for row in found["peers"]:
            assert 0 < row["disagreements"]["float32"] < 1e-5 < row["disagreements"]["bfloat16"] < 5e-2
            lengths = in_order if row["peer"] == "hf" else by_length
            pairs = zip(lengths[::2], lengths[1::2], strict=True)
            assert row["computed_tokens"] == sum(2 * max(pair) for pair in pairs)
            for dtype, ratio in row["ratios"].items():
                ours = found["tokens_per_second"][dtype]
                assert ratio["median"] == pytest.approx(ours / row["tokens_per_second"], rel=0.02)


def test_a_peer_that_is_not_installed_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "nnsight" else object())
    assert peers.installed(["hf", "nnsight"]) == ["hf"]
    assert capsys.readouterr().err == "nnsight: nnsight is not installed: pip install '.[peers]'\n"
    with pytest.raises(UsageError, match="--peers nnsight: none of them"):
        peers.installed(["nnsight"])


def test_the_verdict_is_that_over_the_fastest_peer_that_was_not_taken_apart():
    def row(peer: str, ratio: float) -> peers.PeerRow:
        ratios = {"float32": ratio, "bfloat16": 2 * ratio}
        return peers.PeerRow(peer, 0, 0.0, {key: Ratio(r, r, r, r) for key, r in ratios.items()}, {}, {})

    rows = [row("hf", 9.0), row("nnsight", 5.9), row("hf_bf16", 3.5), row("hf_cut", 2.0)]
    result = peers.PeersResult("middle", (1,), 1, 1, 0.0, {"float32": 1.0, "bfloat16": 2.0}, rows, {})
    assert list(peers.verdicts(result)) == [
        "middle, ours in float32: 5.90 times nnsight, the fastest in float32 (>= 6: no)",
        "middle, ours in float32: 3.50 times hf_bf16, the fastest at any dtype (>= 3: yes)",
        "middle, ours in bfloat16: 11.80 times nnsight, the fastest in float32 (>= 6: yes)",
        "middle, ours in bfloat16: 7.00 times hf_bf16, the fastest at any dtype (>= 3: yes)",
    ]


@pytest.mark.benchmark
def test_a_peer_writes_the_shards_of_the_default_format(workload, tmp_path):
    samples = workload.samples
    two_shards = workload.n_tokens * D_MODEL * 2 // 2
    request = Request(
        workload.model_path, tmp_path, samples, (1,), D_MODEL, np.dtype("float16"), batch_size=2, shard_bytes=two_shards
    )
    peers.load_side("hf", request).run(tmp_path / "theirs")
    shards = list(read_shards(tmp_path / "theirs"))
    assert len(shards) == 2
    items = [item for shard in shards for item in shard[1]]
    assert [item["sample_idx"] for item in items] == [sample.sample_idx for sample in samples]
    for item, sample in zip(items, samples, strict=True):
        assert item["activation"].shape == item["shape"] == (len(sample.token_ids), D_MODEL)
        assert item["activation"].dtype == np.float16


@pytest.mark.benchmark
def test_generation_stores_the_same_activations_and_counts_what_it_generated(source, workload, capsys):
    flags = ["--new_tokens", "3", "--cases", "middle", "--threads", "1", "--repeats", "1"]
    (found,) = result_of(generation, source, capsys, *flags)["results"]
    assert found["prompt_tokens"] == workload.n_tokens
    assert workload.n_tokens < found["seen_tokens"] <= workload.n_tokens + 2 * PROMPTS
    assert 0 < found["disagreement"] < 1e-5
    ratio = found["ours_tokens_per_second"] / found["generation_tokens_per_second"]
    assert found["same_tokens"]["median"] == pytest.approx(ratio, rel=0.1)  # of seconds rounded to milliseconds


def write_shard(folder: Path, items: list[tuple[int, np.ndarray]]) -> Path:
    folder.mkdir(parents=True)
    shard = {
        0: [
            {"sample_idx": i, "activation": values, "shape": values.shape, "text_preview": str(i)}
            for i, values in items
        ]
    }
    with gzip.open(folder / "shard_0001.pkl.gz", "wb") as file:
        pickle.dump(shard, file)
    return folder


def distance(ours: Path, theirs: Path) -> float:
    return worst_disagreement(read_shards(ours), read_shards(theirs), [0], 2)


def test_no_time_counts_when_the_sides_differ(tmp_path):
    one, two = np.ones((4, 8), np.float32), np.full((3, 8), 2, np.float32)
    ours = write_shard(tmp_path / "ours", [(0, one), (1, two)])
    theirs = write_shard(tmp_path / "theirs", [(1, two * np.float32(1.01)), (0, one)])
    assert distance(ours, theirs) == pytest.approx(0.01 / 1.01, rel=1e-3)
    copy = write_shard(tmp_path / "copy", [(0, one), (1, two)])
    assert distance(ours, copy) == 0
    for name, items in {
        "cut": [(0, one[:-1]), (1, two)],
        "missing": [(0, one)],
        "left over": [(0, one), (1, two), (2, two)],
    }.items():
        with pytest.raises(RunError):
            distance(ours, write_shard(tmp_path / name, items))
    side = SimpleNamespace(
        run=lambda folder: write_shard(folder, [(0, one), (1, two * np.float32(1.01))]), shards=read_shards
    )
    request = SimpleNamespace(layers=(0,), samples=(None, None), dtype=np.dtype("float32"))
    with pytest.raises(RunError, match=r"in float32 differ from those of hf by 9.9\de-03"):
        peers.check_agreement({"float32": ours}, "hf", side, tmp_path / "again", request)
    for dtype, name in (("float32", "hf_bf16"), ("bfloat16", "hf")):
        found = peers.check_agreement({dtype: ours}, name, side, tmp_path / f"loose_{dtype}", request)
        assert found == {dtype: pytest.approx(0.0099, rel=1e-2)}


@pytest.mark.benchmark
def test_storage_measures_every_way_and_reads_back_what_it_wrote(source, capsys, tmp_path):
    sizes = ["--all_prompts", "2", "--upload_shard_mb", "0.05", "--repeats", "1", "--work_dir", str(tmp_path)]
    ways = ["--dtypes", "bfloat16", "--link_mb_s", "50", "--cases", "middle", "--codecs", "gzip 6", "planes + zstd 1"]
    result = result_of(storage, source, capsys, *sizes, *ways)
    (found,) = result["cases"]
    rows = {row["way"]: row for row in found["rows"]}
    ways = set(storage.WAYS) - {"npz", "parquet", "arrow"}  # which have no bfloat16
    assert set(rows) == {storage.BASELINE, *ways, "gzip 6", "planes + zstd 1"}
    # The same bytes, so the ratios follow from what the formats are.
    assert rows["pickle"]["ratio"] < 1.05 < rows["pickle.gz"]["ratio"] < rows["planes"]["ratio"]
    assert rows["planes + zstd 1"]["ratio"] > rows["gzip 6"]["ratio"]
    assert found["entropy_ratio"] > 1
    assert found["cores"].keys() == {"pickle.gz", "planes"}
    assert result["disk"]["bytes"] > 0
    (upload,) = result["uploads"]
    assert upload["files"] > 6
    assert upload["raw_mb_s"] <= 51
    assert 0 < upload["cpu_allows"] < 1.0
    assert all(upload[side]["ours"] > 0 for side in ("raw_busy", "run_busy"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.benchmark
def test_layouts_are_measured_and_those_that_datasets_loads_are_marked(source, capsys):
    pytest.importorskip("pyarrow")
    result = result_of(layouts, source, capsys, "--dtypes", "float16", "--repeats", "1")
    rows = {(row["layout"], row["encoding"]): row for row in result["rows"]}
    assert len(rows) == len(layouts.LAYOUTS) * len(layouts.ENCODINGS) + 3
    assert all(row["ratio"] > 0 and row["write"] > 0 and row["read"] > 0 for row in result["rows"])
    loaded = {layout for (layout, _), row in rows.items() if row["is_loaded"]}
    assert loaded == {"lists of lists", "--format parquet", "--format arrow"}
    for name in ("split, zstd 1", "zstd 1"):
        assert rows["lists of lists", name]["ratio"] > rows["lists of lists", "not compressed"]["ratio"]


def test_the_entropy_of_a_plane_is_that_of_its_bytes():
    # The upper byte is one of four, the lower one any of 256.
    words = (np.arange(1024, dtype=np.uint16) % 256) | (np.arange(1024, dtype=np.uint16) // 256 << 8)
    array = words.view(np.float16).reshape(1, 32, 32)
    assert codecs.entropy_ratio(array) == pytest.approx(16 / (8 + 2))


@pytest.mark.parametrize("name", list(codecs.CODECS))
def test_a_codec_gives_back_what_it_took(name):
    block = np.random.default_rng(0).normal(size=(40, 16)).astype(np.float16)
    codec = codecs.CODECS[name]
    assert bytes(codec.decompress(codec.compress(block), block)) == block.tobytes()


def test_sides_take_turns_and_the_ratio_is_of_medians():
    order: list[str] = []
    timings = alternate({name: lambda name=name: order.append(name) for name in "abc"}, 3)
    assert "".join(order) == "abcbcacab"
    assert all(len(side.wall) == len(side.cpu) == 3 for side in timings.values())
    ratio = Ratio.of(Timings([4.0, 9.0, 5.0], [1.0, 1.0, 1.0]), Timings([1.0, 3.0, 2.0], [2.0, 2.0, 2.0]))
    assert (ratio.median, ratio.lowest, ratio.highest, ratio.cpu) == (2.5, 2.5, 4.0, 0.5)


@pytest.mark.benchmark
def test_every_way_to_share_scales_is_measured_and_finer_scales_lose_less(source, capsys):
    found = result_of(quantization, source, capsys, "--layers", "0", "2")["losses"]
    assert len(found) == 2 * (2 * len(quantization.BLOCKS) + 2)
    for layer in (0, 2):
        by_scale = {one["scale"]: one for one in found if one["layer"] == layer}
        assert by_scale["int8, 16"]["relative_l2"] < by_scale["int8, token"]["relative_l2"] < 0.02
        assert by_scale["fp8, token"]["worst_cosine"] > 0.99
        assert by_scale["int8, 16"]["bytes_per_value"] == 1.25


@pytest.mark.benchmark
def test_a_start_is_timed_stage_by_stage(source, tmp_path):
    model, _ = source
    stream = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": [1, 2, 3]}])
    began = time.time()
    seconds = start.one(model, stream, tmp_path, tmp_path / "programs", tmp_path / "none")
    assert list(seconds) == list(start.STAGES)
    assert min(seconds.values()) > 0
    assert sum(seconds.values()) < time.time() - began
    assert (tmp_path / "out/tpu_0/metadata.json").exists()
    with pytest.raises(RunError, match=r"one_start.py failed: .*stream"):
        start.one(model, tmp_path / "no_stream", tmp_path, tmp_path / "programs", tmp_path / "none")


@pytest.mark.benchmark
def test_starts_with_and_without_what_earlier_ones_left_take_turns(tmp_path, monkeypatch):
    calls = []

    def one(model, stream, folder, programs, weights):
        calls.append((programs == tmp_path / "programs", weights == tmp_path / "weights"))
        return dict.fromkeys(start.STAGES, float(len(calls)))

    monkeypatch.setattr(start, "one", one)
    monkeypatch.setattr(start, "_run", lambda *args: "")
    found = start.measure("model", tmp_path / "s.jsonl", tmp_path, 3)
    cases = [(False, False), (False, True), (True, False), (True, True)]
    assert calls == [(True, False), *cases * 3]
    assert [(case.programs, case.weights) for case in found] == cases
    assert [case.total for case in found] == [len(start.STAGES) * (6 + number) for number in range(4)]
    assert "compiled" in start.report(found)


class AtOnce(Executor):
    """Runs what it is given before `submit` returns."""

    def __init__(self, lanes: int) -> None:
        assert lanes == 2

    def submit(self, function, *args):
        future: Future = Future()
        future.set_result(function(*args))
        return future


def test_the_forward_passes_alone_have_two_steps_under_way_as_a_run_has(monkeypatch):
    events: list[str] = []

    def step(name: str) -> StepOutput:
        events.append(f"start {name}")
        return StepOutput({}, name)

    monkeypatch.setattr(common_engine, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(common_engine, "wait_for", lambda peaks: events.append(f"wait {peaks}"))
    job = SimpleNamespace(backend=SimpleNamespace(lanes=lambda *_: 2), model=None, step_request=None)
    engine = Engine(job=job, model=SimpleNamespace(step=step))
    engine.run_steps(["a", "b", "c"])
    assert events == ["start a", "start b", "wait a", "start c", "wait b", "wait c"]
    events.clear()
    engine.run_steps(["a"])
    assert events == ["start a", "wait a"]


@pytest.mark.benchmark
def test_every_writer_of_parquet_is_measured(capsys):
    parquet.run(parquet.build_parser().parse_args(["--rows", "4", "--layers", "2", "--d_model", "8", "--json"]))
    found = json.loads(capsys.readouterr().out)["speeds"]
    assert [one["writer"] for one in found][::3] == ["ours", "datasets, to_parquet"]
    assert all(one["mb_per_s"] >= 0 for one in found)
