"""Wall clocks decide nothing: no early steal, and nobody waits for ever."""

import json

import pytest
from fleets import check_finished, counts, flags
from nursery import Worker
from tally import CLOCKS

HOUR = 3600.0
# By how much each worker's clock is off, and by how much more at some looks.
OFF_BY = [(-HOUR, 2 * HOUR), (HOUR, -2 * HOUR), (0.0, -HOUR)]


@pytest.mark.parametrize("attempt", counts(2, 10))
def test_no_wall_clock_makes_a_worker_steal_or_wait(attempt, nursery, calm, place, tally):
    """Clocks that are an hour ahead or behind, and jump."""
    data, files = calm
    out = place / "out"
    # In every other run one of the three dies, and its shard must pass on.
    victim = attempt // 2 % 3 if attempt % 2 else None
    # The first is quick and looks often at the leases of the others, who send almost no heartbeats.
    patience = [{"claim_ttl_s": 1.5 if victim is not None else 20.0, "claim_heartbeat_s": 0.05}]
    patience += [{"claim_ttl_s": 20.0, "claim_heartbeat_s": 1.0}] * 2
    fleet = [
        nursery.start(
            Worker(
                flags(data, out, number, **patience[number]),
                step_s=0.02 if number == 0 else 0.25,
                clock_s=offset,
                clock_jumps=jump,
                fault="commit.before@2=kill" if number == victim else None,
            )
        )
        for number, (offset, jump) in enumerate(OFF_BY)
    ]
    if victim == 0:
        fleet.append(nursery.start(Worker(flags(data, out, 3, **patience[0]))))
    codes = [worker.wait(60.0) for worker in fleet]
    assert sorted(codes) == sorted([-9] * (victim is not None) + [0] * (len(fleet) - (victim is not None)))
    check_finished(out, files)
    leases = [json.loads(path.read_text()) for path in out.glob("claims/*/*.json") if path.stem.isdigit()]
    taken_over = [lease["replaces"]["pid"] for lease in leases if lease["replaces"]]
    if victim is None:
        assert taken_over == []
    else:
        assert fleet[victim].pid in taken_over
    tally(CLOCKS)
