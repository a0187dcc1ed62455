"""Claims and commits beside a model of plain dicts, in every order that hypothesis finds."""

from fleets import is_full
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from protocol_model import Protocol
from tally import STEPS


def test_claims_and_commits_keep_their_promises_in_any_order(tally):
    examples, steps = (1000, 50) if is_full() else (60, 30)
    run_state_machine_as_test(
        Protocol,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            report_multiple_bugs=False,
        ),
    )
    tally(STEPS, examples)
