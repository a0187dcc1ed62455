"""Host memory does not grow with the dataset."""

import shutil
import subprocess
import sys

from tiny_run import VOCAB, cache_dir, environment, write_jsonl, write_model

# Prints the peak of its own resident memory in KiB after the run. VmHWM begins at the exec; ru_maxrss would begin with
# the memory of the process that forked it.
MEASURED = """
import re, sys
from core.run.config import RunConfig
from core.run.runner import run
dataset, out = sys.argv[1:3]
summary = run(RunConfig(model_path="model", dataset_path=dataset, output_dir=out, checkpoint_dir=out + "_ck",
    compilation_cache_dir=sys.argv[3], shard_size_gb=4e6 / 2**30, max_seq_length=256, dtype="float32",
    activation_type=("residual", "mlp", "attn")))
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], summary.bytes)
"""


def test_ten_times_the_samples_need_less_than_a_tenth_more_memory(tmp_path):
    write_model(tmp_path / "model", tokenizer=False)
    peaks, stored = {}, {}
    # Chance decides how many stages are at their peak together: the short run gets a second throw.
    for n in (300, 300, 3000):
        # Samples of one length: a longer run meets no shape that the shorter one did not compile.
        write_jsonl(tmp_path / f"{n}.jsonl", [{"input_ids": [i % VOCAB] * 200} for i in range(n)])
        argv = [sys.executable, "-c", MEASURED, f"{n}.jsonl", f"out{n}", cache_dir()]
        result = subprocess.run(
            argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True, timeout=500
        )
        peak_kib, n_bytes = map(int, result.stdout.split())
        peaks[n] = max(peaks.get(n, 0), peak_kib * 1024)
        stored[n] = n_bytes
        shutil.rmtree(tmp_path / f"out{n}")
    # What the long run stores on top must dwarf the tolerance, or a leak of all of it would go unseen.
    assert stored[3000] - stored[300] > 3 * 0.1 * peaks[300]
    assert peaks[3000] < 1.1 * peaks[300]
