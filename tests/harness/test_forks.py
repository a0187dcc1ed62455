"""Processes that a test starts do not outlive it."""

import signal

import pytest
from forks import forks_of_a_test


def spin(_: object) -> int:
    """A worker that is stuck."""
    while True:
        pass


def test_a_stuck_process_of_a_failing_test_is_killed(forks):
    started = []

    def test() -> None:
        with forks_of_a_test():
            started.append(forks.start("test_forks:spin", None))
            raise AssertionError("the test fails")

    with pytest.raises(AssertionError, match="the test fails"):
        test()
    (stuck,) = started
    assert stuck.returncode == -signal.SIGKILL


def test_a_process_that_was_there_before_the_test_is_left_alone(forks):
    before = forks.start("test_forks:spin", None)
    with forks_of_a_test():
        pass
    assert before.returncode is None
    before.kill()
    assert before.wait() == -signal.SIGKILL


def test_every_test_kills_the_processes_it_leaves(request):
    assert "no_fork_outlives_its_test" in request.fixturenames
