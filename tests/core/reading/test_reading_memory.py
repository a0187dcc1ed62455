"""Memory does not grow with the run that is read."""

import subprocess
import sys
from pathlib import Path

from tiny_run import environment

from benchmarks.storage.synthetic_run import SyntheticRun, write_run

# Prints its own peak of anonymous memory in KiB: mapped files are the page cache's, which gives them back when asked.
MEASURED = """
import sys, threading
from core.reading import open_activations
def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])
acts = open_activations(sys.argv[1])
before, peak = anonymous(), 0
for flags in ({}, {"shuffle": True, "buffer_bytes": 4 << 20, "open_shards": 4}):
    for batch in acts.tokens(2, batch_size=256, **flags):
        peak = max(peak, anonymous())
print(peak - before, acts.n_tokens)
"""
WIDTH = 512


def test_ten_times_the_shards_are_read_in_the_same_memory(tmp_path):
    grown, stored = {}, {}
    for n in (4, 40):
        out = tmp_path / str(n)
        write_run(out, SyntheticRun({"residual": ((2,), WIDTH)}), [[500, 500]] * n)
        argv = [sys.executable, "-c", MEASURED, str(out)]
        done = subprocess.run(argv, env=environment(), capture_output=True, text=True, check=True, timeout=300)
        peak, n_tokens = map(int, done.stdout.split())
        grown[n], stored[n] = peak * 1024, n_tokens * WIDTH * 2
        assert Path(out).is_dir()
    assert stored[40] > 2 * grown[40], "a reader that held all of it would be seen"
    assert grown[40] < 1.1 * grown[4] + (1 << 20)
    assert grown[40] < 20 << 20, "a buffer of 4 MiB, batches, indices"
