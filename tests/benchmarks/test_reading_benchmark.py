"""The benchmark of reading at a tiny size: every side reads what it says, and ratios are those of the rates."""

import json

import pytest

from benchmarks.storage import reading, reading_peers


@pytest.mark.benchmark
def test_every_side_reads_its_tokens_and_the_ratios_follow_from_the_rates(tmp_path, capsys):
    sizes = ["--shards", "3", "--samples", "6", "--width", "16", "--batch_size", "64", "--buffer_mb", "1"]
    peers = [peer for peer in reading.PEERS if reading_peers.missing_package(peer) is None]
    more = ["--peer_tokens", "200", "--repeats", "2", "--json", "--work_dir", str(tmp_path)]
    reading.run(reading.build_parser().parse_args([*sizes, *more]))
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["rows"]}
    n_tokens = 3 * 6 * reading.CONTEXT
    assert {row["tokens"] for name, row in rows.items() if name not in reading.PEERS} == {n_tokens}
    assert {name: 200 <= rows[name]["tokens"] < n_tokens for name in peers} == dict.fromkeys(peers, True)
    assert result["bytes_of_a_layer"] == n_tokens * 16 * 2
    targets = {target["name"]: target for target in result["targets"]}
    shuffled, in_order = (rows[f"safetensors, {order}, float32"]["cpu_mb_s"] for order in ("shuffled", "in order"))
    assert targets["shuffled / in order, float32"]["cpu"] == pytest.approx(shuffled / in_order, abs=0.01)
    assert ("shuffled / SAELens" in targets) is ("SAELens" in peers)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.benchmark
def test_a_peer_that_is_not_installed_is_left_out_with_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(reading_peers.PEERS, "SAELens", ("no_such_package",))
    sizes = ["--shards", "2", "--samples", "2", "--width", "8", "--peers", "SAELens", "--repeats", "1"]
    reading.run(reading.build_parser().parse_args([*sizes, "--work_dir", str(tmp_path)]))
    printed = capsys.readouterr()
    assert "SAELens: no_such_package is not installed" in printed.err
    assert "| SAELens" not in printed.out
