"""Statistics of committed shards: beside numpy in float64 over what gzip and pickle read."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import environment

from analysis.passes import PartialStore
from analysis.stats import PassOptions, StatsRequest, drop_rules, read_stats, stats
from analysis.stats import compute as stats_compute
from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import RunError, UsageError
from core.reading import open_activations

WINDOWS = [[5, 1, 9], [3, 30, 2], [8, 8], [40], [2, 2, 2]]
SITES = {"mlp": ((0, 2), 8), "residual": ((0, 2, 4), 6)}
FIRST = StatsRequest(drop=drop_rules(None))
NOWHERE = PassOptions(partials="none")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, SyntheticRun(SITES, shard_format="pickle", dtype="float16", gzipped=True), WINDOWS)
    return folder


def rows_of(out: Path, site: str, layer: int, first: int = 1) -> np.ndarray:
    """What gzip and pickle read, without the first tokens of each sample."""
    paths = sorted(out.glob(f"tpu_0/{site}/shard_*.pkl.gz"))
    shards = [pickle.loads(gzip.decompress(path.read_bytes())) for path in paths]
    return np.concatenate([item["activation"][first:] for shard in shards for item in shard[layer]]).astype(np.float64)


def test_the_numbers_are_those_of_two_passes_in_float64(out, tmp_path):
    path = tmp_path / "stats.npz"
    report = stats(str(out), FIRST, NOWHERE, str(path))
    with np.load(path) as file:
        for site, (layers, width) in SITES.items():
            for layer in layers:
                rows = rows_of(out, site, layer)
                found = {n: file[f"{site}/{layer}/{n}"] for n in ("count", "mean", "covariance", "std", "min", "max")}
                centred = rows - rows.mean(axis=0)
                assert found["count"][0] == len(rows) == 100
                np.testing.assert_allclose(found["mean"], rows.mean(axis=0), rtol=1e-12, atol=1e-12)
                np.testing.assert_allclose(found["covariance"], centred.T @ centred / (len(rows) - 1), rtol=1e-10)
                np.testing.assert_allclose(found["std"], rows.std(axis=0, ddof=1), rtol=1e-12)
                np.testing.assert_array_equal(found["min"], rows.min(axis=0))
                summary, norms = report.layers[site][layer], np.linalg.norm(rows, axis=1)
                assert (summary["count"], summary["width"]) == (100, width)
                np.testing.assert_allclose(summary["norm"]["mean"], norms.mean(), rtol=1e-5)
                np.testing.assert_allclose(summary["mean_norm"], np.linalg.norm(rows.mean(axis=0)), rtol=1e-5)
                np.testing.assert_allclose(summary["largest_tokens"][0]["norm"], norms.max(), rtol=1e-5)


def test_the_largest_token_is_named_by_its_place_in_its_sample(out):
    (largest, *_) = stats(str(out), FIRST, NOWHERE).layers["mlp"][2]["largest_tokens"]
    sample = open_activations(str(out))[largest["sample_idx"]]
    norms = np.linalg.norm(sample.activation(2, "mlp").astype(np.float64), axis=1)
    np.testing.assert_allclose(norms[largest["position"]], largest["norm"], rtol=1e-5)
    assert sample.token_ids[largest["position"]] == largest["token_id"]


def test_rules_leave_out_tokens_by_position_and_id(out):
    for drop, first in ((None, 1), ("none", 0), ("first", 1), ("0:2", 2)):
        found = stats(str(out), StatsRequest(drop=drop_rules(drop)), NOWHERE).layers["residual"][4]["count"]
        assert found == len(rows_of(out, "residual", 4, first)), drop
    token = int(open_activations(str(out))[0].token_ids[2])
    found = stats(str(out), StatsRequest(drop=drop_rules([str(token)])), NOWHERE).layers["residual"][4]["count"]
    assert found == 112 - 1


def test_bytes_do_not_depend_on_groups_threads_or_partials(out, tmp_path, monkeypatch):
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    stats(str(out), FIRST, NOWHERE, str(one))
    monkeypatch.setattr(stats_compute, "GROUP_BYTES", 600)
    assert len(stats_compute.groups_of(open_activations(str(out)), FIRST)) > 2
    stats(str(out), FIRST, PassOptions("threads", 2), str(other))
    assert one.read_bytes() == other.read_bytes()
    assert not (out / "analysis").exists()


def test_bytes_do_not_depend_on_processes(out, tmp_path):
    mlp = StatsRequest(sites=("mlp",), drop=drop_rules(None))
    for name, options in (("one.npz", NOWHERE), ("two.npz", PassOptions(workers=2))):
        stats(str(out), mlp, options, str(tmp_path / name))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_an_interrupted_command_goes_on_and_removes_its_partials_at_the_end(out, tmp_path, monkeypatch):
    options = PassOptions(partials=str(tmp_path / "partials"))
    reads = []
    whole = stats_compute.MomentsPass._moments

    def counting(self, part, *rest):
        reads.append(part.window)
        if len(reads) == 12:
            raise KeyboardInterrupt
        return whole(self, part, *rest)

    monkeypatch.setattr(stats_compute.MomentsPass, "_moments", counting)
    with pytest.raises(KeyboardInterrupt):
        stats(str(out), FIRST, options, str(tmp_path / "stats.npz"))
    assert not (tmp_path / "stats.npz").exists()
    kept = PassOptions(partials=options.partials, keep_partials=True)
    interrupted = stats(str(out), FIRST, kept, str(tmp_path / "stats.npz"))
    assert len(list(tmp_path.rglob("*.partial"))) > 0
    monkeypatch.undo()
    assert stats(str(out), FIRST, NOWHERE).layers == interrupted.layers
    stats(str(out), FIRST, options, str(tmp_path / "stats.npz"))
    assert not (tmp_path / "partials").exists()


def test_another_content_under_the_output_is_refused_before_anything_is_read(out, tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    stats(str(out), FIRST, NOWHERE, str(path))
    stats(str(out), FIRST, NOWHERE, str(path))
    monkeypatch.delattr(stats_compute.MomentsPass, "map")
    with pytest.raises(UsageError, match="exists with other content: remove it, or choose another --output"):
        stats(str(out), StatsRequest(), NOWHERE, str(path))


def test_a_copy_of_the_output_gives_the_same_file(out, tmp_path):
    import shutil

    copy = shutil.copytree(out, tmp_path / "copy")
    for folder, name in ((out, "one.npz"), (copy, "two.npz")):
        stats(str(folder), FIRST, NOWHERE, str(tmp_path / name))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_bad_parts_and_requests_are_one_line(out, tmp_path):
    import shutil

    copy = shutil.copytree(out, tmp_path / "copy")
    shard = copy / "tpu_0/mlp/shard_0002.pkl.gz"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"tpu_0/mlp/shard_0002.pkl.gz cannot be read: .*analyze_activations.py verify"):
        stats(str(copy), FIRST, NOWHERE)
    for request, message in (
        (StatsRequest(layers=(7,)), "layer 7 of mlp is not stored: choose from 0, 2"),
        (StatsRequest(sites=("attn",)), "site 'attn' is not stored: choose one of mlp, residual"),
        (StatsRequest(drop=drop_rules(":")), "0 tokens are left: statistics need at least 2"),
    ):
        with pytest.raises(RunError, match=message):
            stats(str(out), request, NOWHERE)


def test_nan_in_a_shard_names_file_layer_sample_and_position(tmp_path):
    write_run(tmp_path, SyntheticRun({"mlp": ((0,), 4)}, shard_format="safetensors", dtype="float32"), [[3, 3]])
    path = tmp_path / "tpu_0/mlp/shard_0001.safetensors"
    if not path.exists():
        path = tmp_path / "tpu_0/shard_0001.safetensors"
    data = bytearray(path.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little") + header["layer_0"]["data_offsets"][0]
    data[start + 4 * 16 : start + 4 * 16 + 4] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    message = r"shard_0001.safetensors, layer 0: sample 1, position 1, dimension 0: nan: .*verify"
    with pytest.raises(RunError, match=message):
        stats(str(tmp_path), FIRST, NOWHERE)


def test_blocks_grow_until_a_partial_is_a_quarter_of_what_is_read():
    (group, *_) = [stats_compute.MomentsPass("mlp", (0, 1), drop_rules("none"))]

    class Part:
        n_bytes = 8 * 64 * 64

    def facts(self, part):
        from analysis.passes import PartFacts

        return PartFacts("", part.n_bytes, None)

    monkey = pytest.MonkeyPatch()
    monkey.setattr(stats_compute.MomentsPass, "facts", facts)
    assert stats_compute.block_size([Part()] * 3, group, 64) == 8
    monkey.undo()


def test_a_file_of_statistics_is_read_back(out, tmp_path):
    path = str(tmp_path / "stats.npz")
    stats(str(out), FIRST, NOWHERE, path)
    moments = read_stats(path, "mlp", 2)
    rows = rows_of(out, "mlp", 2)
    np.testing.assert_allclose(moments.scatter, np.cov(rows.T) * (len(rows) - 1), rtol=1e-10)
    for arguments, message in (
        ((None, 2), "layer 2 of any site is there more than once: it has mlp/0"),
        (("mlp", 7), "layer 7 of mlp is not in it"),
    ):
        with pytest.raises(UsageError, match=message):
            read_stats(path, *arguments)
    for data in (b"", b"PK\x03\x04", Path(path).read_bytes()[:-40]):
        (tmp_path / "damaged.npz").write_bytes(data)
        with pytest.raises(UsageError, match="it is no file of statistics"):
            read_stats(str(tmp_path / "damaged.npz"), "mlp", 2)
    with pytest.raises(UsageError, match="there is no such file"):
        read_stats(str(tmp_path / "missing.npz"), "mlp", 2)


MEASURED = """
import re, sys
from analysis.stats import PassOptions, StatsRequest, drop_rules, stats
stats(sys.argv[1], StatsRequest(drop=drop_rules(None)), PassOptions(partials="none"))
print(re.search(r"VmHWM:\\\\s+(\\\\d+) kB", open("/proc/self/status").read())[1])
"""


def test_ten_times_the_shards_need_no_more_memory(tmp_path):
    """A partial has 2 MB: 40 of them at once would be 80 MB."""
    peaks = {}
    run = SyntheticRun({"residual": ((0,), 500)}, shard_format="safetensors", dtype="float16")
    for n in (4, 40):
        write_run(tmp_path / str(n), run, [[150]] * n)
        argv = [sys.executable, "-c", MEASURED.replace("\\\\", "\\"), str(tmp_path / str(n))]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=True)
        peaks[n] = int(done.stdout) * 1024
    assert peaks[40] - peaks[4] < 30e6


def test_partials_lie_in_the_output_unless_told_otherwise(out):
    assert PassOptions().store("gs://b/out") == PartialStore("gs://b/out/analysis")
    assert PassOptions(partials="/tmp/x").store("gs://b/out") == PartialStore("/tmp/x")
    assert PassOptions(partials="none").store("gs://b/out") is None
    assert os.path.exists(out)
