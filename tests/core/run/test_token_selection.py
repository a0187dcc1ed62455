"""A run that stores some tokens alone, against a run that stores all of them."""

import gzip
import json
import pickle
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from resealing import write_and_reseal
from safetensors.numpy import load_file, save_file
from tiny_run import (
    D_MODEL,
    committed_files,
    environment,
    stream_config,
    token_lines,
    write_jsonl,
    write_model,
)

from analysis.verification.verify import verify
from core.activation_storage import ActivationStorage
from core.base.errors import RunError, UsageError
from core.hosts.pod_slice import SINGLE_HOST
from core.hosts.session import HostSession
from core.pricing.plan import price_run
from core.run import extraction
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.runner import run
from core.run.stores import open_storage
from core.run.stream_run import LoadedStep, load, prepare_stream, run_stream
from core.shards.formats import FORMATS
from core.shards.window_activations import WindowActivations
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host

SITES = ("resid_pre", "q", "mlp_act", "residual")
# Token ids whose embeddings are far longer than the others.
LOUD = (7, 70, 200)
LINES = token_lines(30, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("model"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][list(LOUD)] *= 40
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def full(model, tmp_path_factory) -> RunConfig:
    """The run of all tokens, in float32 and one window."""
    home = tmp_path_factory.mktemp("full")
    config = stream_config(
        home,
        model,
        LINES,
        max_seq_length=256,
        activation_type=SITES,
        layers_to_extract=(0, 2),
        dtype="float32",
    )
    for pack in (True, False):
        run(replace(config, pack=pack, output_dir=str(home / f"out_{pack}")))
    return config


def stored(out: Path) -> dict[tuple[str, int, int], dict]:
    """(site, layer, sample_idx) -> the stored dict, read with gzip and pickle alone."""
    items = {}
    for path in sorted(out.glob("tpu_0/**/shard_*.pkl.gz")):
        for layer, samples in pickle.loads(gzip.decompress(path.read_bytes())).items():
            for item in samples:
                assert (path.parent.name, layer, item["sample_idx"]) not in items
                items[path.parent.name, layer, item["sample_idx"]] = item
    return items


def table(out: Path) -> dict[int, dict]:
    lines = (
        line
        for path in sorted(out.glob("tpu_0/samples_*.jsonl.gz"))
        for line in gzip.decompress(path.read_bytes()).splitlines()
    )
    return {row["sample_idx"]: row for row in map(json.loads, lines)}


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("tpu_0/shard_*.json"))]


def outliers(everything: dict, sample: int, factor: float) -> set[int]:
    """By norms in float64 of what the full run stored; a norm at the very limit would make the test say nothing."""
    found = set()
    for site in ("resid_pre", "residual"):
        for layer in (0, 2):
            norms = np.linalg.norm(everything[site, layer, sample]["activation"].astype(np.float64), axis=1)
            ratio = norms / np.median(norms)
            assert (np.abs(ratio - factor) > 1e-3).all()
            found |= set(np.flatnonzero(ratio > factor).tolist())
    return found


RULES = {
    "positions": {"positions": ("0:3", "-2:")},
    "limit": {"max_tokens_per_sample": 5, "token_choice": "last"},
    "random": {"max_tokens_per_sample": 20, "token_choice": "random"},
    "outliers": {"exclude_norm_outliers": 3.0},
    "outliers and limit": {"exclude_norm_outliers": 3.0, "max_tokens_per_sample": 9},
    "nearly all": {"positions": ("1:",)},
}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("rules", RULES)
def test_what_is_stored_is_the_full_run_picked_afterwards_bit_for_bit(full, tmp_path, rules, pack):
    out = tmp_path / "out"
    summary = run(replace(full, output_dir=str(out), pack=pack, **RULES[rules]))
    everything, selected, rows = stored(Path(f"{full.output_dir}_{pack}")), stored(out), table(out)
    assert selected.keys() == everything.keys()
    assert selected
    for key, item in selected.items():
        places = item["token_positions"]
        np.testing.assert_array_equal(item["activation"], everything[key]["activation"][places])
        assert item["shape"] == item["activation"].shape
        assert rows[key[2]]["n_tokens"] == len(places)
    for index, line in enumerate(LINES):
        length, kept = len(line["input_ids"]), set(selected["residual", 0, index]["token_positions"].tolist())
        if "positions" in RULES[rules]:
            wanted = {p for text in RULES[rules]["positions"] for p in range(length)[slice(*parsed(text))]}
            assert kept == wanted
        if "exclude_norm_outliers" in RULES[rules]:
            left = [p for p in range(length) if p not in outliers(everything, index, 3.0)]
            assert kept == set(left[: RULES[rules].get("max_tokens_per_sample")])
    if "exclude_norm_outliers" in RULES[rules]:
        loud = sum(token in LOUD for line in LINES for token in line["input_ids"])
        assert summary.dropped_tokens["norm_outlier"] >= loud > 5
    assert verify(str(out)).ok, verify(str(out)).lines()


def parsed(text: str) -> list[int | None]:
    return [int(end) if end else None for end in text.split(":")]


def test_counts_and_reasons_are_kept_beside_the_activations(full, tmp_path):
    out = tmp_path / "out"
    rules = {"exclude_tokens": ("eos", "pad"), "positions": ("2:40",), "max_tokens_per_sample": 10}
    summary = run(replace(full, output_dir=str(out), **rules))
    (record,) = records(out)
    rows = table(out)
    for index, line in enumerate(LINES):
        row, ids = rows[index], line["input_ids"]
        assert row["token_ids"] == ids
        reasons = {place: name for name, runs in row["dropped"].items() for a, b in runs for place in range(a, b)}
        left = [place for place in range(2, min(40, len(ids))) if ids[place] != 257]
        assert sorted(set(range(len(ids))) - reasons.keys()) == left[:10]
        assert row["n_tokens"] == len(left[:10])
        assert all(
            name == ("pad" if ids[place] == 257 else "limit") for place, name in reasons.items() if 2 <= place < 40
        )
    lengths = [len(line["input_ids"]) for line in LINES]
    assert record["n_tokens"] + sum(record["n_dropped"].values()) == sum(lengths) == summary.tokens
    assert record["n_dropped"] == summary.dropped_tokens
    # The tokenizer's pad and end tokens are one: it counts for the first reason, in the order of the registry.
    assert record["n_dropped"].keys() == {"pad", "position", "limit"}
    assert record["n_empty"] == summary.empty_samples == sum(length <= 2 for length in lengths)
    index = json.loads((out / "tpu_0/metadata.json").read_text())
    assert index["total_dropped_tokens"] == record["n_dropped"]
    assert index["total_tokens"] == record["n_tokens"]


@pytest.mark.parametrize("format_name", list(FORMATS))
def test_a_sample_of_which_nothing_is_kept_is_stored_with_no_token(full, tmp_path, format_name):
    lines = [{"input_ids": [1, 2, 3]}, {"input_ids": list(range(30))}, {"input_ids": [4]}]
    config = replace(
        full,
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", lines)),
        output_dir=str(tmp_path / "out"),
        positions=("10:",),
        format=format_name,
        activation_type=("residual",),
    )
    assert run(config).empty_samples == 2
    (path,) = (tmp_path / "out/tpu_0").glob(f"shard_0001{FORMATS[format_name].suffix}*")
    data = path.read_bytes()
    (tmp_path / "shard").write_bytes(gzip.decompress(data) if path.suffix == ".gz" else data)
    with (tmp_path / "shard").open("rb") as stream:
        shard = FORMATS[format_name].read(stream)
    assert shard.sample_idx == (0, 1, 2)
    assert [array.shape for array in shard.layers[2]] == [(0, D_MODEL), (20, D_MODEL), (0, D_MODEL)]
    assert [places.tolist() for places in shard.positions] == [[], list(range(10, 30)), []]
    if shard.token_ids is not None:
        assert [ids.tolist() for ids in shard.token_ids] == [[], list(range(10, 30)), []]
    assert verify(str(tmp_path / "out")).ok
    nothing = replace(config, positions=("200:",), output_dir=str(tmp_path / "nothing"))
    assert run(nothing).empty_samples == 3
    assert verify(str(tmp_path / "nothing")).ok


def test_without_a_selection_nothing_is_stored_of_it(full):
    out = Path(f"{full.output_dir}_True")
    assert all(item.keys() == {"sample_idx", "activation", "shape", "text_preview"} for item in stored(out).values())
    assert all("dropped" not in row for row in table(out).values())
    assert records(out)[0]["n_dropped"] == {}
    assert json.loads((out / "run.json").read_text())["selection"] is None


@dataclass
class Crossing:
    """What crosses to the host: its bytes, and for each step which share of its tokens was gathered; None: all."""

    fetched: int = 0
    gathers: list[float | None] = field(default_factory=list)

    def gather(self, output, places):
        (length, *_) = {peaks.shape[2] for peaks in output.peaks.values()}
        self.gathers.append(None if places is None else places.shape[1] / length)
        return gather(output, places)

    def begin_copies(self, output):
        self.fetched += sum(array.nbytes for array in output.arrays.values())
        return begin_copies(output)


def crossing(config: RunConfig) -> Crossing:
    counts = Crossing()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "gather", counts.gather)
        patch.setattr(extraction, "begin_copies", counts.begin_copies)
        assert run(config).status == "complete"
    return counts


def test_a_whole_step_is_let_go_once_its_tokens_are_gathered(full, tmp_path, monkeypatch):
    """While a copy takes long one step waits for its norms and one for room; the others that wait are gathered."""
    rules = RULES["outliers and limit"]
    config = replace(full, output_dir=str(tmp_path / "out"), batch_size=1, pack=False, **rules)
    job = prepare_job(config, "float32")
    step, scatter, wholes, alive = load(job).step, WindowActivations.scatter, [], []

    def watched(arrays):
        output = on_host(step(arrays))
        output = replace(output, arrays={site: array.copy() for site, array in output.arrays.items()})
        wholes.append(weakref.ref(output.arrays["residual"]))
        return output

    def slow(*args):
        time.sleep(0.05)
        alive.append(sum(array() is not None for array in wholes))
        scatter(*args)

    monkeypatch.setattr(WindowActivations, "scatter", slow)
    model, session = LoadedStep(watched, 0.0), HostSession(SINGLE_HOST, "run", threading.Event())
    assert run_stream(prepare_stream(job, open_storage(job)), model, session).status == "complete"
    assert len(alive) > 10
    assert max(alive) <= 2


@pytest.mark.parametrize("rules", ["positions", "limit", "outliers and limit"])
def test_fewer_bytes_leave_the_device(full, tmp_path, rules):
    everything = crossing(replace(full, output_dir=str(tmp_path / "all")))
    selected = crossing(replace(full, output_dir=str(tmp_path / "out"), **RULES[rules]))
    assert set(everything.gathers) == {None}
    assert selected.fetched < everything.fetched / 3
    assert all(share < 1 for share in selected.gathers)


def test_a_selection_that_keeps_nearly_all_is_not_gathered(full, tmp_path):
    stream = write_jsonl(tmp_path / "s.jsonl", [{"input_ids": list(range(20, 276))}] * 3)
    config = replace(full, dataset_path=str(stream), output_dir=str(tmp_path / "out"), positions=("1:",))
    assert set(crossing(config).gathers) == {None}


def test_eight_devices_store_what_one_does_and_what_their_full_run_has(full, tmp_path):
    chosen = {name: RULES[name] for name in ("outliers and limit", "positions")}
    config = replace(full, batch_size=1)
    script = """
        import dataclasses, sys, jax
        from core.run.config import RunConfig
        from core.run.runner import run
        assert jax.device_count() == 8
        config, rules = eval(sys.argv[1]), eval(sys.argv[2])
        for name, changes in {"all": {}, **rules}.items():
            run(dataclasses.replace(config, output_dir=name, **changes))
    """
    devices = environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    argv = [sys.executable, "-c", textwrap.dedent(script), repr(config), repr(chosen)]
    subprocess.run(argv, cwd=tmp_path, env=devices, check=True)
    everything = stored(tmp_path / "all")
    for name, rules in chosen.items():
        selected = stored(tmp_path / name)
        assert selected.keys() == everything.keys()
        for key, item in selected.items():
            assert len(item["token_positions"]) <= 9
            np.testing.assert_array_equal(item["activation"], everything[key]["activation"][item["token_positions"]])
        run(replace(config, output_dir=str(tmp_path / f"one {name}"), **rules))
        of_one, of_eight = table(tmp_path / f"one {name}"), table(tmp_path / name)
        assert of_one == of_eight


def test_float16_overflow_at_a_token_that_is_left_out_is_no_reason_to_stop(full, tmp_path):
    huge = write_model(tmp_path / "huge")
    weights = load_file(huge / "model.safetensors")
    weights["model.embed_tokens.weight"][7] *= 1e6
    save_file(weights, huge / "model.safetensors")
    lines = [{"input_ids": [7, *range(20, 60)]}, {"input_ids": [7, *range(60, 90)]}]
    config = replace(
        full,
        model_path=str(huge),
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", lines)),
        output_dir=str(tmp_path / "out"),
        dtype="float16",
        activation_type=("residual",),
    )
    for rules in ({}, {"positions": ("0:5",)}, {"exclude_norm_outliers": 1e9}):
        with pytest.raises(RunError, match=r"sample_idx 0, residual after layer 0: magnitude \d+ at token 0 "):
            run(replace(config, **rules))
    assert committed_files(tmp_path / "out") == {}
    for name, rules in {"static": {"positions": ("1:",)}, "norms": {"exclude_norm_outliers": 50.0}}.items():
        summary = run(replace(config, output_dir=str(tmp_path / name), **rules))
        assert sum(summary.dropped_tokens.values()) == 2
        assert verify(str(tmp_path / name)).ok


def test_nan_is_reported_and_not_left_out_as_an_outlier(full, tmp_path):
    broken = write_model(tmp_path / "nan", scale=float("nan"))
    with pytest.raises(RunError, match="NaN or infinity"):
        run(replace(full, model_path=str(broken), output_dir=str(tmp_path / "out"), exclude_norm_outliers=2.0))


@pytest.mark.parametrize("rules", ["positions", "outliers and limit"])
def test_windows_follow_what_may_be_stored_and_a_crash_changes_no_byte(full, tmp_path, rules, monkeypatch):
    config = replace(
        full,
        output_dir=str(tmp_path / "calm"),
        shard_size_gb=8_000 / 2**30,
        activation_type=("residual",),
        **RULES[rules],
    )
    calm = run(config)
    assert calm.shards > 3
    most = {"positions": 5, "outliers and limit": 9}[rules]
    for record in records(tmp_path / "calm")[:-1]:
        lengths = [len(LINES[i]["input_ids"]) for i in range(record["first_sample_idx"], record["last_sample_idx"] + 1)]
        # 2 layers of 32 float32 each; a window ends at the first sample with which it has 8,000 bytes of them.
        stored_bytes = [min(length, most) * 2 * D_MODEL * 4 for length in lengths]
        assert sum(stored_bytes[:-1]) < 8_000 <= sum(stored_bytes)
    commit = ActivationStorage.commit

    def dying(self, record):
        if record.window == 2:
            raise RunError("killed here")
        return commit(self, record)

    monkeypatch.setattr(ActivationStorage, "commit", dying)
    with pytest.raises(RunError, match="killed here"):
        run(replace(config, output_dir=str(tmp_path / "out")))
    monkeypatch.undo()
    run(replace(config, output_dir=str(tmp_path / "out")))
    assert committed_files(tmp_path / "out") == committed_files(tmp_path / "calm")


def test_a_window_ends_where_its_token_ids_alone_are_as_large_as_a_shard(full, tmp_path):
    """Else next to nothing stored would mean next to everything held in memory."""
    config = replace(full, output_dir=str(tmp_path / "out"), shard_size_gb=2_000 / 2**30, max_tokens_per_sample=1)
    run(replace(config, activation_type=("q",), layers_to_extract=(0,)))
    seen = [record["n_tokens"] + sum(record["n_dropped"].values()) for record in records(tmp_path / "out")]
    assert len(seen) > 3
    assert max(seen) <= 500 + 200


def test_another_selection_in_the_same_folder_is_refused_by_name(full, tmp_path):
    config = replace(full, output_dir=str(tmp_path / "out"), positions=("0:4",))
    run(config)
    assert run(replace(config, positions=(":4", "0:4"))).samples == 0
    with pytest.raises(UsageError, match=r"selection\.positions"):
        run(replace(config, positions=("0:5",)))
    with pytest.raises(UsageError, match="selection"):
        run(replace(config, positions=()))


def test_kinds_of_tokens_need_a_tokenizer_and_norms_a_residual_stream(full, tmp_path):
    bare = write_model(tmp_path / "bare", tokenizer=False)
    config = replace(full, model_path=str(bare), output_dir=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"--exclude_tokens eos needs a tokenizer .*--tokenizer_path"):
        run(replace(config, exclude_tokens=("eos",)))
    with pytest.raises(UsageError, match=r"--exclude_norm_outliers needs .*resid_pre, resid_mid, residual"):
        run(replace(config, activation_type=("mlp",), exclude_norm_outliers=4.0))
    assert run(replace(config, exclude_tokens=("eos",), tokenizer_path=full.model_path)).samples == len(LINES)


@pytest.mark.parametrize(
    "change",
    [
        {"exclude_tokens": ("cls",)},
        {"exclude_norm_outliers": 1.0},
        {"exclude_norm_outliers": float("nan")},
        {"max_tokens_per_sample": 0},
        {"token_choice": "last"},
        {"positions": ("3",)},
    ],
)
def test_rules_that_cannot_be_are_refused_by_name(full, change):
    (name,) = change
    with pytest.raises(UsageError, match=f"--{name}"):
        replace(full, **change)


def test_ranges_from_the_end_are_no_flags_to_the_command_line():
    from extract_activations import build_parser

    flags = build_parser().parse_args(["--positions", "-8:", "0:4", "-3:-1", "--max_tasks", "3"])
    assert (flags.positions, flags.max_tasks) == (["-8:", "0:4", "-3:-1"], 3)


def test_the_plan_says_what_a_selection_saves_and_what_is_left_to_do(full, tmp_path):
    config = replace(full, output_dir=str(tmp_path / "out"), shard_size_gb=20_000 / 2**30, **RULES["positions"])
    plan = price_run(replace(config, plan=True))
    everything = price_run(replace(full, output_dir=str(tmp_path / "none"), plan=True))
    assert everything.bytes_saved == 0
    assert plan.bytes_saved + plan.bytes_on_disk == pytest.approx(everything.bytes_on_disk, rel=0.1)
    assert any("which saves" in line for line in plan.lines())
    summary = run(config)
    assert (plan.tokens, plan.shards, plan.dropped_tokens) == (summary.tokens, summary.shards, summary.dropped_tokens)
    assert plan.stored_tokens == summary.tokens - sum(summary.dropped_tokens.values())
    last = sorted((tmp_path / "out/tpu_0").glob("shard_*.json"))[-1]
    left = json.loads(last.read_text())["n_samples"]
    last.unlink()
    rest = price_run(replace(config, plan=True))
    assert (rest.samples, rest.shards, rest.committed_samples) == (left, 1, len(LINES) - left)
    run(config)
    done = price_run(replace(config, plan=True))
    assert (done.samples, done.committed_samples, done.exit_code) == (0, len(LINES), 0)
    assert "nothing is left to do" in done.lines()


def damaged(out: Path, name: str, change) -> list[str]:
    """The problems after `change` of a gzipped file whose record is made to agree, as a bug in the writer would."""
    path = out / "tpu_0" / name
    write_and_reseal(path, gzip.compress(change(gzip.decompress(path.read_bytes()))), out / "tpu_0")
    return [problem for folder in verify(str(out)).folders for problem in folder.problems]


def test_a_mask_that_is_not_that_of_the_shard_is_found(full, tmp_path):
    config = replace(full, positions=("1:9",), activation_type=("residual",))

    def fresh(name: str) -> Path:
        run(replace(config, output_dir=str(tmp_path / name)))
        return tmp_path / name

    def shifted(rows: bytes) -> bytes:
        return rows.replace(b'"dropped": {"position": [[0, 1], [9,', b'"dropped": {"position": [[0, 2], [10,', 1)

    def renamed(rows: bytes) -> bytes:
        return rows.replace(b'"position": [[0, 1]', b'"limit": [[0, 1]', 1)

    def overlapping(rows: bytes) -> bytes:
        return rows.replace(b"[[0, 1], [9,", b"[[0, 1], [0,", 1)

    def moved(shard: bytes) -> bytes:
        items = pickle.loads(shard)
        for samples in items.values():
            samples[3]["token_positions"] = samples[3]["token_positions"] + 1
        return pickle.dumps(items)

    def without(shard: bytes) -> bytes:
        items = pickle.loads(shard)
        for samples in items.values():
            for item in samples:
                del item["token_positions"]
        return pickle.dumps(items)

    samples, shard = "samples_0001.jsonl.gz", "shard_0001.pkl.gz"
    assert any("token positions are not those" in p for p in damaged(fresh("a"), samples, shifted))
    assert any("leaves out" in p for p in damaged(fresh("b"), samples, renamed))
    assert any("overlaps another" in p for p in damaged(fresh("c"), samples, overlapping))
    assert any("sample 3: its token positions" in p for p in damaged(fresh("d"), shard, moved))
    assert any("only one of the shard and the sample table" in p for p in damaged(fresh("e"), shard, without))
