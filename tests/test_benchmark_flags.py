"""Nonsense on a benchmark's command line is one line, before anything is measured."""

import importlib

import pytest


@pytest.mark.parametrize(
    "line",
    [
        "fleet_simulation --away_s -100000",
        "fleet_simulation --workers 0",
        "fleet_simulation --heartbeat_s 0",
        "fleet_simulation --ttl_s -1",
        "fleet_simulation --ttl_s nan",
        "fleet_simulation --preemptions_per_hour 1 -1",
        "fleet_limits --workers 0",
        "fleet_limits --workers 1.5",
        "fleet_limits --tokens_per_second -5",
        "fleet_limits --chips_per_host 0",
        "fleet_limits --heartbeat_s 0",
        "start --prompts 0",
        "start --repeats 0",
        "quantization --prompts -1",
        "generation --new_tokens 16 0",
        "utilisation --windows 0",
        "utilisation --batch_size 0",
        "peers --shard_mb inf",
        "storage --link_mb_s -1",
        "storage --upload_copies 0",
        "workload --prompts few",
        "gpu --steps 0",
        "gpu_attention --tokens 0",
        "gpu_compile --tokens 0",
    ],
)
def test_a_number_that_cannot_be_is_refused_in_one_line(line, capsys):
    name, flag, *values = line.split()
    if name in ("generation", "peers"):
        pytest.importorskip("torch")
    parser = importlib.import_module(f"benchmarks.{name}").build_parser()
    with pytest.raises(SystemExit) as refused:
        parser.parse_args([flag, *values])
    assert refused.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"error: argument {flag}: {values[-1]}: expected a")
