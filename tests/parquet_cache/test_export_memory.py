"""Host memory does not grow with the number of texts."""

import subprocess
import sys

import pytest

pytest.importorskip("torch")

from chess_games import game, write_gpt2, write_rows
from tiny_run import cache_dir, environment

# Prints the peak of its resident memory in KiB and the bytes written, after a small export and after a large one.
MEASURED = """
import re, sys
import jax
from prepare import prepare
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
for name in ("small", "large"):
    options = dict(dtype="float32", sort_ds_by_len=True, deduplicate=True, ds_shuffle_seed=0, batches_per_shard=20)
    made = prepare("model", f"{name}.jsonl", "Transcript", name, ds_label_columns="Site", **options)
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], made.bytes_written)
"""


def test_ten_times_the_texts_need_no_more_memory(tmp_path):
    write_gpt2(tmp_path / "model")
    # Texts of one length: the large export meets no shape that the small one did not compile.
    text = " ".join(game(1, longest=400).split()[:48])
    for name, count in (("small", 320), ("large", 3200)):
        # Spaces are not tokens, but with more of them a text is no duplicate.
        rows = [{"Transcript": text + " " * i, "Site": f"{i}"} for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, cache_dir()],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    (small_peak, small_bytes), (large_peak, large_bytes) = (map(int, line.split()) for line in done.stdout.splitlines())
    # What the large one stores on top must dwarf what is allowed, or a leak of all of it would go unseen.
    assert large_bytes - small_bytes > 3 * 0.05 * small_peak * 1024
    assert large_peak < 1.05 * small_peak
