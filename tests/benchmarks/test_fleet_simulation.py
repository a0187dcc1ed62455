"""The simulated fleet loses no window and no second, and agrees with what can be worked out on paper."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from benchmarks.fleet import limits as fleet_limits
from benchmarks.fleet import simulation as fleet_simulation
from benchmarks.fleet.limits import ChipLoad, Limits
from benchmarks.fleet.limits import rows as limits_of
from benchmarks.fleet.simulation import Fleet, Simulation, simulate
from core.base.errors import UsageError

STORM = Fleet(
    workers=20, shards=60, windows=7, window_s=50, start_s=30, away_s=90, preemptions_per_hour=10, noticed=0.4, seed=3
)


def test_without_preemption_the_makespan_is_that_of_rounds_of_shards():
    fleet = Fleet(workers=8, shards=24, windows=5, window_s=40, start_s=100, claim_s=2)
    outcome = simulate(fleet)
    assert outcome.makespan_s == pytest.approx(100 + 3 * (2 + 5 * 40))
    assert outcome.spent_s["computed"] == pytest.approx(fleet.work_s)
    assert outcome.spent_s["lost"] == outcome.spent_s["away"] == outcome.takeovers == 0
    # One shard more is one round more, and the others wait for it.
    uneven = simulate(replace(fleet, shards=25))
    assert uneven.makespan_s == pytest.approx(100 + 4 * (2 + 5 * 40))
    assert uneven.spent_s["waited"] > 6 * 5 * 40


@pytest.mark.parametrize("seed", range(8))
def test_every_window_is_committed_once_and_every_second_is_accounted_for(seed):
    simulation = Simulation(replace(STORM, seed=seed))
    outcome = simulation.outcome()
    assert simulation.done == [STORM.windows] * STORM.shards
    assert outcome.windows == STORM.shards * STORM.windows
    assert outcome.preemptions > 50
    assert outcome.takeovers > 5
    assert outcome.spent_s["computed"] == pytest.approx(STORM.work_s)
    assert sum(outcome.spent_s.values()) == pytest.approx(STORM.workers * outcome.makespan_s)
    assert all(seconds >= 0 for seconds in outcome.spent_s.values())
    # A preemption cuts off at most one window.
    assert outcome.spent_s["lost"] <= outcome.preemptions * STORM.window_s
    assert outcome.makespan_s >= STORM.work_s / STORM.workers


def test_one_worker_under_preemption_is_as_fast_as_the_renewal_theorem_says():
    """Between two preemptions of mean distance 1/λ, 1/(exp(λτ) - 1) windows of length τ are completed on average."""
    fleet = Fleet(
        workers=1,
        shards=1,
        windows=4000,
        window_s=120,
        start_s=60,
        away_s=240,
        preemptions_per_hour=6,
        noticed=1,
        claim_s=0,
    )
    windows_each = 1 / (math.exp(fleet.window_s * 6 / 3600) - 1)
    expected = fleet.windows / windows_each * (3600 / 6 + fleet.away_s + fleet.start_s)
    assert simulate(fleet).makespan_s == pytest.approx(expected, rel=0.05)


def test_a_silent_lease_is_taken_over_after_the_ttl_and_a_released_one_at_once():
    fleet = Fleet(workers=30, shards=30, windows=10, window_s=60, preemptions_per_hour=2, away_s=1e6, seed=1)
    silent, released = simulate(replace(fleet, noticed=0)), simulate(replace(fleet, noticed=1))
    assert silent.takeovers > 0
    assert released.takeovers == 0
    assert silent.makespan_s >= released.makespan_s


def test_the_requests_of_a_waiting_fleet_grow_with_its_workers_and_not_with_their_square():
    """500 of 1,000 workers wait for the others: at 4,000 to 5,000 names a look takes 5 requests, a look each 10 s."""
    fleet = Fleet(workers=1000, shards=1500, windows=12, window_s=60)
    assert simulate(fleet).peak_reads <= 1000 * 5 / 10


def test_the_same_seed_gives_the_same_fleet():
    assert simulate(STORM) == simulate(STORM)
    assert simulate(STORM) != simulate(replace(STORM, seed=4))


def test_nonsense_is_refused():
    for change in ({"workers": 0}, {"window_s": 0}, {"noticed": 2}, {"heartbeat_s": 0}, {"away_s": -1}, {"ttl_s": 0}):
        with pytest.raises(UsageError, match="a fleet needs"):
            replace(STORM, **change)


@pytest.mark.benchmark
def test_the_command_prints_and_draws(tmp_path, capsys):
    picture = tmp_path / "scaling.svg"
    flags = [
        "--workers",
        "1",
        "5",
        "--preemptions_per_hour",
        "0",
        "2",
        "--shards_per_worker",
        "2",
        "--windows_per_shard",
        "4",
    ]
    parser = fleet_simulation.build_parser()
    fleet_simulation.run(parser.parse_args([*flags, "--svg", str(picture), "--json"]))
    rows = json.loads(capsys.readouterr().out)
    assert [(row["fleet"]["workers"], row["fleet"]["preemptions_per_hour"]) for row in rows] == [
        (1, 0),
        (5, 0),
        (1, 2),
        (5, 2),
    ]
    lines = ElementTree.parse(picture).getroot().iter("{http://www.w3.org/2000/svg}polyline")
    assert len(list(lines)) == 4
    fleet_simulation.run(parser.parse_args(flags))
    assert capsys.readouterr().out.count("\n") == 6


def test_a_resource_saturates_where_its_load_is_one():
    load = ChipLoad("model", 1000.0, 10, 500, "here")
    for row in limits_of(load, 7, Limits()):
        if row.saturates_at is not None:
            (there,) = (r for r in limits_of(load, row.saturates_at, Limits()) if r.resource == row.resource)
            assert there.load == pytest.approx(1)
    by_name = {row.resource: row for row in limits_of(load, 7, Limits(ratio=2, chips_per_host=4))}
    # 1,000 tokens of 10 layers of 500 values of 2 bytes, on four chips, half of it stored.
    assert by_name["host to network, B/s"].demand == 4 * 1000 * 10 * 500 * 2 / 2
    assert by_name["into the bucket, B/s"].demand == 7 * by_name["host to network, B/s"].demand


def test_the_limits_are_printed_for_the_rate_that_is_asked_for(capsys):
    parser = fleet_limits.build_parser()
    fleet_limits.run(parser.parse_args(["--workers", "1", "--tokens_per_second", "1e9", "--json"]))
    found = json.loads(capsys.readouterr().out)
    assert {table["load"]["tokens_per_second"] for table in found} == {1e9}
    fleet_limits.run(parser.parse_args(["--workers", "2", "--tokens_per_second", "1e9"]))
    assert "| always" in capsys.readouterr().out
