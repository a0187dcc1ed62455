"""Nonsense on a benchmark's command line is one line, before anything is measured."""

import importlib

import pytest


@pytest.mark.parametrize(
    "line",
    [
        "fleet.simulation --away_s -100000",
        "fleet.simulation --workers 0",
        "fleet.simulation --heartbeat_s 0",
        "fleet.simulation --ttl_s -1",
        "fleet.simulation --ttl_s nan",
        "fleet.simulation --preemptions_per_hour 1 -1",
        "fleet.limits --workers 0",
        "fleet.limits --workers 1.5",
        "fleet.limits --tokens_per_second -5",
        "fleet.limits --chips_per_host 0",
        "fleet.limits --heartbeat_s 0",
        "start --prompts 0",
        "start --repeats 0",
        "quantization --prompts -1",
        "moments --tokens 0",
        "moments --widths 576 -1",
        "parquet --rows 0",
        "generation --new_tokens 16 0",
        "utilisation --windows 0",
        "utilisation --batch_size 0",
        "peers.benchmark --shard_mb inf",
        "storage.benchmark --link_mb_s -1",
        "storage.benchmark --upload_copies 0",
        "common.workload --prompts few",
        "gpu.benchmark --steps 0",
        "gpu.attention --tokens 0",
        "gpu.compilation --tokens 0",
    ],
)
def test_a_number_that_cannot_be_is_refused_in_one_line(line, capsys):
    name, flag, *values = line.split()
    if name in ("generation", "peers.benchmark"):
        pytest.importorskip("torch")
    parser = importlib.import_module(f"benchmarks.{name}").build_parser()
    with pytest.raises(SystemExit) as refused:
        parser.parse_args([flag, *values])
    assert refused.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: argument {flag}: {values[-1]}: expected a")
