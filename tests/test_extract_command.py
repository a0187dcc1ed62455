"""`extract_activations.py` and `analyze_activations.py` as a user runs them."""

import gzip
import json
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tiny_run import (
    arc_lines,
    command,
    committed_files,
    environment,
    extract,
    run,
    token_lines,
    write_jsonl,
    write_model,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def one_line_error(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The single line of an error; nothing on stdout, no trace."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[0]


def test_the_summary_is_one_json_object_on_stdout_and_everything_else_on_stderr(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(12))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--output_dir", "out", "--max_seq_length", 256)
    result = extract(tmp_path, *args, "--json", "--log_file", "log.txt")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["samples"] == 12
    assert summary["tokens"] == sum(len(line["input_ids"]) for line in token_lines(12))
    assert set(summary["stages"]) == {"read", "forward", "copy", "encode", "store"}
    assert summary["bottleneck"] in summary["stages"]
    assert summary["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out/tpu_0").glob("s*_0001.*gz"))
    assert "complete: 12 samples" in (tmp_path / "log.txt").read_text()
    metrics = [json.loads(line) for line in (tmp_path / "out/tpu_0/metrics.jsonl").read_text().splitlines()]
    assert [line["event"] for line in metrics] == ["commit", "end"]
    assert metrics[-1]["tokens"] == summary["tokens"]


def test_shards_are_read_by_ten_lines_that_know_gzip_pickle_and_numpy_alone(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", arc_lines(3))
    extract(tmp_path, "--model_path", model, "--dataset_path", "s.jsonl", "--output_dir", "out")
    script = """
        import gzip, pickle, sys
        import numpy as np
        shard = pickle.load(gzip.open("out/tpu_0/shard_0001.pkl.gz", "rb"))
        assert list(shard) == [0, 1, 2]
        assert [item["sample_idx"] for item in shard[0]] == list(range(24))
        for items in shard.values():
            for item in items:
                assert set(item) == {"sample_idx", "activation", "shape", "text_preview"}
                assert type(item["activation"]) is np.ndarray and item["activation"].shape == item["shape"]
                assert item["text_preview"].startswith("Task: task") and len(item["text_preview"]) <= 200
    """
    subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(script)], cwd=tmp_path, check=True)
    unzipped = subprocess.run(["zcat", tmp_path / "out/tpu_0/shard_0001.pkl.gz"], capture_output=True, check=True)
    assert set(pickle.loads(unzipped.stdout)) == {0, 1, 2}


def test_verify_accepts_an_undisturbed_run_and_names_any_file_that_is_touched(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(5))
    extract(
        tmp_path, "--model_path", model, "--dataset_path", "s.jsonl", "--output_dir", "out", "--max_seq_length", 256
    )
    result = run("analyze_activations.py", "verify", "out", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ok"] is True
    shard = tmp_path / "out/tpu_0/shard_0001.pkl.gz"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run("analyze_activations.py", "verify", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert "shard_0001.pkl.gz" in result.stderr
    assert run("analyze_activations.py", "verify", "nothing", cwd=tmp_path).returncode == 2


def test_the_worker_id_comes_from_the_flag_then_the_environment(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(2))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--output_dir", "out", "--max_seq_length", 256)
    extract(tmp_path, *args, TPU_WORKER_ID="4", WORKER_ID="5")
    extract(tmp_path, *args, WORKER_ID="5")
    extract(tmp_path, *args, "--worker_id", 6, TPU_WORKER_ID="4")
    assert sorted(path.name for path in (tmp_path / "out").glob("tpu_*")) == ["tpu_4", "tpu_5", "tpu_6"]
    assert "TPU_WORKER_ID=x" in one_line_error(extract(tmp_path, *args, TPU_WORKER_ID="x"), 2)


def corrupt_config(folder: Path, model: Path) -> Path:
    shutil.copytree(model, folder)
    (folder / "config.json").unlink()
    return folder


BAD_INPUTS = {
    "missing file": ({"--dataset_path": "nowhere.jsonl"}, 2, "nowhere.jsonl"),
    "empty stream": ({"--dataset_path": "empty.jsonl"}, 1, "empty.jsonl"),
    "broken JSON": ({"--dataset_path": "broken.jsonl"}, 1, "broken.jsonl:7:"),
    "no pairs": ({"--dataset_path": "nopairs.jsonl"}, 1, "nopairs.jsonl:2:"),
    "no such layer": ({"--layers_to_extract": "3"}, 2, "--layers_to_extract 3"),
    "no config": ({"--model_path": "noconfig"}, 2, "noconfig"),
    "no model": ({"--model_path": "./missing_model"}, 2, "missing_model"),
    "no such kind of token": ({"--exclude_tokens": "foo"}, 2, "--exclude_tokens"),
    "bad encoder": ({"--grid_encoder": "__import__('os')"}, 2, "--grid_encoder"),
    "bad prompt version": ({"--prompt_version": "v9"}, 2, "--prompt_version v9"),
    "too long": ({"--max_seq_length": "5000"}, 2, "--max_seq_length 5000"),
    "upload without bucket": ({"--upload_to_gcs": None}, 2, "--gcs_bucket"),
    "output is a file": ({"--output_dir": "empty.jsonl"}, 2, "empty.jsonl"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_gets_one_line_and_leaves_nothing(case, model, tmp_path):
    flags, code, named = BAD_INPUTS[case]
    write_jsonl(tmp_path / "s.jsonl", arc_lines(2))
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "broken.jsonl", [*arc_lines(6), '{"train": [', *arc_lines(2)])
    write_jsonl(tmp_path / "nopairs.jsonl", [arc_lines(1)[0], {"train": [], "test": [{"input": [[1]]}]}])
    corrupt_config(tmp_path / "noconfig", model)
    args = {"--model_path": model, "--dataset_path": "s.jsonl", "--output_dir": "out", "--checkpoint_dir": "ck"} | flags
    result = extract(tmp_path, *(str(part) for flag in args.items() for part in flag if part is not None))
    assert named in one_line_error(result, code)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    assert not (tmp_path / "ck").exists()


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(model, tmp_path):
    small = Path("/dev/shm")
    if not small.is_dir():
        pytest.skip("no /dev/shm")
    write_jsonl(tmp_path / "s.jsonl", token_lines(60))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256, "--shard_size_gb", 0.0001)
    assert extract(tmp_path, *args, "--output_dir", "calm").returncode == 0
    # A limit on the size of any one file is what a test may set without mounting a disk.
    limited = ["bash", "-c", 'ulimit -f 60; trap "" XFSZ; exec "$@"', "_", *command("extract_activations.py")]
    flags = [*map(str, args), "--output_dir", "out", "--compilation_cache_dir", "cache"]
    result = subprocess.run(
        limited + flags, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    error = one_line_error(result, 1)
    assert "cannot write" in error
    assert not list((tmp_path / "out").rglob("shard_*.pkl.gz"))
    assert extract(tmp_path, *args, "--output_dir", "out").returncode == 0
    assert committed_files(tmp_path / "out") == committed_files(tmp_path / "calm")


def test_sigterm_commits_what_is_computed_and_the_next_run_goes_on(model, tmp_path, forks):
    write_jsonl(tmp_path / "s.jsonl", token_lines(400))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256, "--shard_size_gb", 0.0001)
    assert extract(tmp_path, *args, "--output_dir", "calm").returncode == 0
    child = forks.command("extract_activations.py", *args, "--output_dir", "out", cwd=tmp_path)
    while not (tmp_path / "out/tpu_0/shard_0002.json").exists():
        assert child.returncode is None, child.errors
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    checkpoint = json.loads((tmp_path / "checkpoints/checkpoint_worker_0.json").read_text())
    assert checkpoint["status"] == "stopped"
    assert extract(tmp_path, *args, "--output_dir", "out").returncode == 0
    assert committed_files(tmp_path / "out") == committed_files(tmp_path / "calm")


def test_gzip_text_and_chat_streams_are_told_apart_by_their_keys(model, tmp_path):
    lines = [{"text": f"sample number {i}", "topic": i} for i in range(3)]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(x) + "\n" for x in lines).encode()))
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    for name, preview in (("t.jsonl.gz", "sample number 0"), ("chat.jsonl", "<|start|>user\nhi<|end|>\n")):
        out = tmp_path / name.split(".")[0]
        result = extract(tmp_path, "--model_path", model, "--dataset_path", name, "--output_dir", out)
        assert result.returncode == 0, result.stderr
        shard = pickle.loads(gzip.decompress((out / "tpu_0/shard_0001.pkl.gz").read_bytes()))
        assert shard[0][0]["text_preview"] == f"Task: 0, Prompt: {preview}"
        assert shard[0][0]["activation"].shape[0] > 0


def test_what_nobody_foresaw_is_one_line_too(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(2))
    (tmp_path / "afile").write_text("")
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256)
    assert "afile" in one_line_error(extract(tmp_path, *args, "--output_dir", "afile/sub"), 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/run.json").write_text("[1]")
    assert "run.json" in one_line_error(extract(tmp_path, *args, "--output_dir", "out"), 1)


def test_a_given_worker_id_needs_no_environment(model, tmp_path):
    write_jsonl(tmp_path / "s.jsonl", token_lines(2))
    args = ("--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 256)
    result = extract(tmp_path, *args, "--worker_id", 3, TPU_WORKER_ID="not a number")
    assert result.returncode == 0, result.stderr
