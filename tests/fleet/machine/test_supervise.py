"""supervise.sh: one command at a time, again after a crash, never again after the end."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from vm import SCRIPTS, command_lines, stopped_at_the_end, supervise, until, write_program, write_vm

FAST = ("--first_delay_s", "0", "--max_delay_s", "0")


@pytest.fixture
def host(tmp_path):
    """The folder of one host."""
    folder = tmp_path / "activations"
    with stopped_at_the_end(tmp_path):
        yield folder


def job(host: Path, text: str, flags: tuple[str, ...] = FAST) -> list[str]:
    script = host.parent / "job.sh"
    write_program(script, f"#!/bin/bash\necho run >>{host.parent}/runs\n{text}\n")
    return ["--id", "job1", *flags, "--", str(script)]


def runs(host: Path) -> int:
    path = host.parent / "runs"
    return len(path.read_text().split()) if path.exists() else 0


def state(host: Path) -> str:
    return supervise(host, "status").stdout.split()[2]


def pid(host: Path) -> int:
    return int((host / "supervisor/pid").read_text())


FOREVER = "trap 'exit 143' TERM; while :; do sleep 0.05; done"


def test_a_job_that_ends_well_is_finished_and_not_run_again(host):
    assert supervise(host, "run", *job(host, "exit 0")).returncode == 0
    assert (state(host), runs(host)) == ("finished", 1)


def test_a_crash_is_followed_by_another_run(host):
    crash_twice = f"[ $(wc -l <{host.parent}/runs) -ge 3 ] || kill -SEGV $$; exit 0"
    assert supervise(host, "run", *job(host, crash_twice)).returncode == 0
    assert (state(host), runs(host)) == ("finished", 3)


def test_wrong_flags_are_not_tried_again(host):
    assert supervise(host, "run", *job(host, "exit 2")).returncode == 2
    assert (state(host), runs(host)) == ("failed", 1)


def test_a_job_that_never_lasts_is_given_up(host):
    words = job(host, "exit 1")
    assert supervise(host, "run", "--max_failures", "4", *words).returncode == 1
    assert (state(host), runs(host)) == ("failed", 4)


def test_runs_that_last_do_not_count_as_failures_in_a_row(host):
    crash_until = f"[ $(wc -l <{host.parent}/runs) -ge 6 ] && exit 0; exit 1"
    words = job(host, crash_until)
    assert supervise(host, "run", "--max_failures", "2", "--steady_s", "0", *words).returncode == 0
    assert runs(host) == 6


def test_the_pause_before_the_next_run_grows_and_is_bounded(host):
    words = job(host, "exit 1", ("--first_delay_s", "1", "--max_delay_s", "2"))
    log = supervise(host, "run", "--max_failures", "3", *words).stdout
    assert [line.split()[3] for line in log.splitlines() if " waiting " in line] == ["1", "2"]


def test_start_returns_and_the_job_goes_on_and_logs(host):
    supervise(host, "start", *job(host, f"echo hello; {FOREVER}"))
    assert state(host) == "running"
    until(lambda: "hello" in (host / "logs/extract.log").read_text())


def test_starting_twice_runs_once(host):
    for _ in range(2):
        assert " running job1 " in supervise(host, "start", *job(host, FOREVER)).stdout
    assert runs(host) == 1


def test_start_shows_wrong_flags_at_once(host):
    assert " failed job1 exit code 2" in supervise(host, "start", *job(host, "sleep 0.5; exit 2")).stdout


def test_stop_lets_the_job_commit_and_it_is_not_started_again(host):
    commits = f"trap 'sleep 0.3; touch {host.parent}/committed; exit 143' TERM; while :; do sleep 0.05; done"
    supervise(host, "start", *job(host, commits))
    until(lambda: runs(host) == 1)
    assert " stopped " in supervise(host, "stop").stdout
    assert (host.parent / "committed").exists()
    assert (state(host), runs(host)) == ("stopped", 1)


def test_after_a_stop_it_can_be_started_again(host):
    supervise(host, "start", *job(host, FOREVER))
    supervise(host, "stop")
    assert " running " in supervise(host, "start", *job(host, FOREVER)).stdout


def test_the_shutdown_of_the_vm_reaches_the_job_once(host):
    """The extraction commits at its first SIGTERM and dies of the second; a shutdown signals it and its supervisor."""
    commits = f"trap 'trap - TERM; sleep 0.5; touch {host.parent}/committed; exit 143' TERM; echo $$ >{host}/pid"
    supervise(host, "start", *job(host, f"{commits}; while :; do sleep 0.05; done"))
    until((host / "pid").exists)
    os.kill(int((host / "pid").read_text()), signal.SIGTERM)
    until(lambda: not catches_term(int((host / "pid").read_text())))
    os.kill(pid(host), signal.SIGTERM)
    until(lambda: state(host) == "ended")
    assert (host.parent / "committed").exists()


def catches_term(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False
    mask = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(mask >> (signal.SIGTERM - 1) & 1)


def test_a_signal_to_the_supervisor_alone_is_passed_on(host):
    supervise(host, "start", *job(host, FOREVER))
    until(lambda: runs(host) == 1)
    os.kill(pid(host), signal.SIGTERM)
    until(lambda: state(host) == "ended")


def test_a_job_whose_supervisor_was_killed_is_not_run_a_second_time(host):
    supervise(host, "start", *job(host, f"echo $$ >{host}/pid; {FOREVER}"))
    until((host / "pid").exists)
    os.kill(pid(host), signal.SIGKILL)
    supervise(host, "start", *job(host, FOREVER))
    assert (state(host), runs(host)) == ("running", 1)
    os.kill(int((host / "pid").read_text()), signal.SIGTERM)
    until(lambda: state(host) == "dead")
    supervise(host, "start", *job(host, FOREVER))
    until(lambda: runs(host) == 2)


def test_secrets_reach_the_job_and_nothing_else(host, tmp_path):
    write_vm(tmp_path / "vm")
    words = job(host, f'[ "$HF_TOKEN" = "value of the secret" ] && touch {tmp_path}/known; {FOREVER}')
    path = f"{tmp_path / 'vm'}:{os.environ['PATH']}"
    supervise(host, "start", "--secret_env=HF_TOKEN=my-token", *words, PATH=path)
    until((tmp_path / "known").exists)
    assert "value of the secret" not in command_lines()
    written = [file for file in tmp_path.rglob("*") if file.is_file() and "value of the secret" in file.read_text()]
    assert sorted(file.name for file in written) == ["gcloud", "job.sh"], "where the test itself put it"


def test_a_secret_that_cannot_be_read_is_tried_again_and_named(host, tmp_path):
    write_vm(tmp_path / "vm")
    path = f"{tmp_path / 'vm'}:{os.environ['PATH']}"
    words = ["--max_failures", "2", "--secret_env=HF_TOKEN=other", *job(host, "exit 0")]
    done = supervise(host, "run", *words, PATH=path)
    assert (done.returncode, runs(host)) == (1, 0)
    assert "the secret other cannot be read" in done.stdout


@pytest.mark.parametrize("words", [["--max_failures", "a[$(reboot)]"], ["--id", "a b"], ["--color"], ["--env=x"]])
def test_bad_flags_are_usage_errors(host, words):
    assert supervise(host, "run", *words, "--", "true").returncode == 2


def test_the_scripts_are_clean_for_bash():
    for script in SCRIPTS.glob("*.sh"):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
