"""kill -9 at random moments: the output of the resumed run is byte-identical to that of an undisturbed one."""

import os
import random
import time

from tiny_run import committed_files, extract, run, token_lines, write_jsonl, write_model

# Fewer than with FAULTS=all, which is `make test-faults`.
N_KILLS = 30 if os.environ.get("FAULTS") == "all" else 4


def test_resume_after_random_kills_is_byte_identical(tmp_path, forks):
    model = write_model(tmp_path / "model", tokenizer=False)
    write_jsonl(tmp_path / "s.jsonl", token_lines(500, longest=150))
    args = (
        "--model_path", model, "--dataset_path", "s.jsonl", "--max_seq_length", 128, "--shard_size_gb", 0.0001,
        "--compilation_cache_dir", tmp_path / "cache",
    )  # fmt: skip
    assert extract(tmp_path, *args, "--output_dir", "calm").returncode == 0
    started = time.monotonic()
    assert extract(tmp_path, *args, "--output_dir", "timed").returncode == 0
    whole = time.monotonic() - started
    rng = random.Random(20)
    kills = 0
    while kills < N_KILLS:
        child = forks.command("extract_activations.py", *args, "--output_dir", "out", cwd=tmp_path)
        try:
            child.wait(whole * rng.uniform(0.1, 1.0))
        except TimeoutError:
            child.kill()
            child.wait()
            kills += 1
        else:
            assert child.returncode == 0
            # Finished before the kill: the committed half is taken away again, as if never written.
            _forget_the_last_windows(tmp_path / "out" / "tpu_0", keep=rng.randrange(5))
    assert extract(tmp_path, *args, "--output_dir", "out").returncode == 0
    assert committed_files(tmp_path / "out") == committed_files(tmp_path / "calm")
    assert run("analyze_activations.py", "verify", "out", cwd=tmp_path).returncode == 0


def _forget_the_last_windows(folder, keep: int) -> None:
    """Removes the records of all windows but the first `keep`, newest first, and some of the files that follow them."""
    for record in sorted(folder.glob("shard_*.json"), reverse=True)[: -keep or None]:
        window = record.stem.removeprefix("shard_")
        record.unlink()
        if int(window) % 2:
            (folder / f"shard_{window}.pkl.gz").unlink()
