"""When a watch ends, and what it asks to find out."""

import pytest

from core.base.errors import RunError, UsageError
from fleet.decisions import Action, Decision
from fleet.gcloud.machines import Machine, Slot
from fleet.launching import ExtractionState, Launched
from fleet.reconciling import Outcome, Result
from fleet.watching import Round, dataset_finished, output_url, watch

DECISION = Decision(Slot("n", "z", 0), Action.KEEP, "READY", "ready", Machine("v5litepod-8", "r", True, False))


def round_of(*extractions: ExtractionState, absent: int = 0) -> Round:
    launched = tuple(Launched(DECISION, extraction, "") for extraction in extractions)
    return Round((Outcome(DECISION, Result.READY, ""),) * (len(launched) + absent), launched)


def verdict_after(*rounds: Round, finished: bool | None) -> tuple[bool, str]:
    """The verdict of a watch that sees these rounds; a round too many is an error."""
    left = list(rounds)
    verdict = watch(lambda: left.pop(0), lambda last: finished, lambda: None)
    assert not left, "it ended too early"
    return verdict.ok, verdict.message


def test_a_finished_dataset_ends_it_whatever_the_workers_do():
    assert verdict_after(round_of(ExtractionState.RUNNING), finished=True)[0]


def test_it_goes_on_while_a_worker_does():
    rounds = [
        round_of(ExtractionState.RUNNING, ExtractionState.FINISHED),
        round_of(ExtractionState.FINISHED, ExtractionState.FINISHED),
    ]
    assert verdict_after(*rounds, finished=None)[0]


def test_it_goes_on_while_a_tpu_is_missing():
    rounds = [round_of(ExtractionState.FINISHED, absent=1), round_of(ExtractionState.FINISHED)]
    assert verdict_after(*rounds, finished=None)[0]


def test_workers_that_ended_without_the_dataset_end_it_with_an_error():
    ok, message = verdict_after(round_of(ExtractionState.FINISHED), finished=False)
    assert (ok, "not finished" in message) == (False, True)


def test_no_worker_left_ends_it_with_an_error():
    assert not verdict_after(round_of(ExtractionState.FAILED, ExtractionState.FINISHED), finished=None)[0]


def test_a_round_that_fails_is_followed_by_another_but_wrong_flags_are_not():
    errors = [RunError("gcloud is moody"), UsageError("--tpu_type has to say")]

    def one_round() -> Round:
        raise errors.pop(0)

    with pytest.raises(UsageError):
        watch(one_round, lambda last: None, lambda: None)
    assert errors == []


@pytest.mark.parametrize(
    ("flags", "url"),
    [
        ("--use_sharded_dataset --gcs_bucket b", "gs://b/activations"),
        ("--upload_to_gcs --gcs_bucket=b --gcs_prefix /x/y/", "gs://b/x/y"),
        ("--output_dir gs://b/out", "gs://b/out"),
        ("--output_dir gs://b/old --output_dir=gs://b/new", "gs://b/new"),
        ("--gcs_bucket b --dataset_path d", None),
        ("--output_dir activations", None),
        ("", None),
    ],
)
def test_where_the_output_will_be(flags, url):
    assert output_url(flags.split()) == url


def analysis(tmp_path, status: str, verify: str):
    """A stand-in for analyze_activations.py that answers `status` and `verify` with these lines of Python."""
    lines = ["import sys, json", "command, url = sys.argv[1:3]", "assert (url, sys.argv[3]) == ('gs://b', '--json')"]
    lines += [f"if command == 'status': {status}", f"if command == 'verify': {verify}"]
    (tmp_path / "analyze_activations.py").write_text("\n".join(lines))
    return tmp_path


WELL, NOT_WELL = "print(json.dumps({'ok': True}))", "print(json.dumps({'ok': False})); sys.exit(1)"


@pytest.mark.parametrize("finished", [True, False])
def test_status_tells_whether_the_dataset_is_finished(tmp_path, finished):
    root = analysis(tmp_path, f"print(json.dumps({{'finished': {finished}}}))", "sys.exit('not asked')")
    assert dataset_finished("gs://b", root, workers_ended=True) is finished


@pytest.mark.parametrize(("verify", "expected"), [(WELL, True), (NOT_WELL, False), ("sys.exit(1)", None)])
def test_without_status_verify_tells_but_only_once_the_workers_have_ended(tmp_path, verify, expected):
    root = analysis(tmp_path, "sys.exit(2)", verify)
    assert dataset_finished("gs://b", root, workers_ended=False) is None
    assert dataset_finished("gs://b", root, workers_ended=True) is expected
