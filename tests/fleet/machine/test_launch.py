"""launch, logs and ssh, on TPU VMs that are folders: code, environment, worker numbers, supervisor, secrets."""

import subprocess
import sys
import tarfile
import time
from io import BytesIO
from pathlib import Path

import pytest
from fake_tpus import FakeTpus
from vm import RUN_UNTIL_TOLD, command_lines, stopped_at_the_end, until, write_vm

from fleet.bundle import build_bundle
from fleet.command_line import main
from fleet.launching import HostState, flags_of_worker, parse_states, state_of

A, B = "us-central1-a", "us-central1-b"
ROOT = Path(__file__).parents[3]
FLAGS = ("--", "--dataset_path", "gs://b/stream_{worker_id:03d}.jsonl", "--verbose")


@pytest.fixture
def hosts(fleet, tmp_path):
    """The folder that holds the homes of the hosts: <TPU's id>/<name>/<host>."""
    write_vm(tmp_path / "vm_bin")
    with stopped_at_the_end(tmp_path / "hosts"):
        yield tmp_path / "hosts"


def put(tpus: FakeTpus, zone: str, worker: int = 0, tpu_type: str = "v5litepod-8") -> None:
    """The first TPU of the fleet in a zone, ready."""
    labels = {"activations-fleet": "activations", "activations-worker": str(worker)}
    tpus.put(zone, f"activations-{zone}-0", "READY", labels=labels, acceleratorType=tpu_type)


def ran(hosts: Path, name: str, host: int = 0) -> list[str]:
    """What the extraction on a host was started with: worker=<TPU_WORKER_ID>, then its flags."""
    (path,) = hosts.glob(f"*/{name}/{host}/ran")
    return path.read_text().splitlines()


def test_launch_sets_up_and_starts_each_worker_with_its_own_number(fleet, tpus, hosts):
    put(tpus, A)
    put(tpus, B, worker=1)
    done = fleet("launch", "--zones", f"{A},{B}", *FLAGS)
    assert done.returncode == 0, done.stderr
    for worker, zone in enumerate((A, B)):
        number, *flags = ran(hosts, f"activations-{zone}-0")
        assert number == f"worker={worker}"
        assert flags == ["--dataset_path", f"gs://b/stream_00{worker}.jsonl", "--verbose"]


def test_launching_twice_copies_and_starts_once(fleet, tpus, hosts):
    put(tpus, A)
    fleet("launch", "--zones", A, *FLAGS)
    done = fleet("launch", "--zones", A, *FLAGS)
    assert (done.returncode, len(tpus.calls("scp"))) == (0, 1)
    assert ": running: " in done.stderr


def test_every_host_of_a_slice_runs_multihost_and_keeps_libtpus_own_numbering(fleet, tpus, hosts):
    put(tpus, A, worker=5, tpu_type="v5litepod-16")
    done = fleet("launch", "--zones", A, "--", "--verbose")
    assert done.returncode == 0, done.stderr
    for host in range(4):
        assert ran(hosts, f"activations-{A}-0", host) == ["worker=", "--verbose", "--multihost", "--worker_id", "5"]


def test_flags_arrive_as_they_were_given(fleet, tpus, hosts):
    flags = ["--grid_encoder", "GridShapeEncoder(RowNumberEncoder(x))", "a b'c\"$(touch pwned)`id`;\\ #é", "", "*"]
    put(tpus, A)
    fleet("launch", "--zones", A, "--", *flags)
    assert ran(hosts, f"activations-{A}-0")[1:] == flags


def test_other_flags_need_a_restart(fleet, tpus, hosts):
    put(tpus, A)
    fleet("launch", "--zones", A, *FLAGS)
    refused = fleet("launch", "--zones", A, "--", "--max_tasks", "3")
    assert refused.returncode == 1
    assert "runs something else" in refused.stderr
    assert fleet("launch", "--zones", A, "--restart", "--", "--max_tasks", "3").returncode == 0
    assert ran(hosts, f"activations-{A}-0")[1:] == ["--max_tasks", "3"]


def test_wrong_flags_fail_at_launch_and_can_be_corrected(fleet, tpus, hosts, tmp_path):
    write_vm(tmp_path / "vm_bin", job="exit 2\n")
    put(tpus, A)
    wrong = fleet("launch", "--zones", A, "--", "--layers", "x")
    assert (wrong.returncode, "the flags are wrong" in wrong.stderr) == (1, True)
    write_vm(tmp_path / "vm_bin")
    assert fleet("launch", "--zones", A, "--", "--max_tasks", "3").returncode == 0


def test_a_tpu_that_is_not_ready_is_named_and_the_others_start(fleet, tpus, hosts):
    tpus.put(A, f"activations-{A}-0", "CREATING")
    put(tpus, B, worker=1)
    done = fleet("launch", "--zones", f"{A},{B}", *FLAGS)
    assert done.returncode == 1
    assert f"activations-{A}-0: not ready: CREATING" in done.stderr
    assert ran(hosts, f"activations-{B}-0")[0] == "worker=1"


def test_a_host_that_does_not_listen_yet_is_tried_again(fleet, tpus, hosts):
    put(tpus, A)
    tpus.fail("ssh", "refused")
    assert fleet("launch", "--zones", A, *FLAGS).returncode == 0


def test_a_dry_run_of_launch_copies_and_runs_nothing(fleet, tpus, hosts):
    put(tpus, A)
    done = fleet("launch", "--zones", A, "--dry-run", *FLAGS)
    assert (done.returncode, tpus.calls("ssh", "scp")) == (0, [])
    assert "would run: gcloud compute tpus tpu-vm scp" in done.stderr


def test_a_secret_is_named_and_its_value_is_nowhere(fleet, tpus, hosts, tmp_path):
    job = f'[ "$HF_TOKEN" = "value of the secret" ] && touch {tmp_path}/known\n{RUN_UNTIL_TOLD}'
    write_vm(tmp_path / "vm_bin", job)
    put(tpus, A)
    done = fleet("launch", "--zones", A, "--secret_env", "HF_TOKEN=my-token", *FLAGS)
    until((tmp_path / "known").exists)
    assert "value of the secret" not in done.stdout + done.stderr + command_lines()
    files = [path for path in hosts.rglob("*") if path.is_file() and "archive" not in path.name]
    assert not [path for path in files if b"value of the secret" in path.read_bytes()]


SECRETS = [
    ("--hub_token", "hf_abcdefghijklmnopqrstuvwx"),
    ("--dataset_path", "https://user:pass@example.com/x"),
    ("--x", "ya29.a0AfH6SMBabcdefghijk"),
    ("--x", "-----BEGIN PRIVATE KEY-----"),
    ("--x", "github_pat_11ABCDEFG0abcdefghijkl"),
    ("--api_key=abc123", "--api_key=abc123"),
]


@pytest.mark.parametrize(("flag", "value"), SECRETS)
def test_what_looks_like_a_secret_is_refused_without_repeating_it(fleet, tpus, capsys, flag, value):
    assert main(["launch", "--zones", A, "--", flag, value]) == 2
    printed = capsys.readouterr()
    assert value not in printed.out + printed.err
    assert tpus.calls() == []


def test_a_token_given_for_the_name_of_its_secret_is_refused(fleet, tpus, capsys):
    assert main(["launch", "--zones", A, "--secret_env", "HF_TOKEN=hf_abcdefghijklmnopqrstuvwx", "--", "-v"]) == 2
    assert "hf_abc" not in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--worker_id", "--worker_id=3", "--host_id=0"])
def test_flags_that_number_workers_belong_to_launch(fleet, tpus, flag):
    assert main(["launch", "--zones", A, "--", flag, "3"]) == 2
    assert tpus.calls() == []


def test_logs_show_every_host_by_name(fleet, tpus, hosts):
    put(tpus, A, tpu_type="v5litepod-16")
    fleet("launch", "--zones", A, *FLAGS)
    shown = fleet("logs", "--zones", A, "--lines", "5").stdout
    name = f"activations-{A}-0"
    assert [f"{name} {name}-w{host}: " in shown for host in range(4)] == [True] * 4


def test_ssh_runs_a_command_on_one_host_or_on_all(fleet, tpus, hosts):
    put(tpus, A, tpu_type="v5litepod-16")
    name = f"activations-{A}-0"
    assert fleet("ssh", name, "--", "hostname").stdout == f"{name}-w0\n"
    everywhere = fleet("ssh", name, "--worker", "all", "--", "hostname | tr a-z A-Z").stdout.split()
    assert sorted(everywhere) == [f"{name}-w{host}".upper() for host in range(4)]


def test_ssh_goes_to_no_tpu_of_others(fleet, tpus, hosts):
    tpus.put(A, "precious", "READY", labels={})
    assert fleet("ssh", "precious", "--", "hostname").returncode == 1
    assert tpus.calls("ssh") == []


def test_the_watch_recreates_relaunches_and_ends_with_the_dataset(fleet, tpus, hosts, tmp_path):
    """A preempted TPU comes back as another machine, gets the code again and goes on, until all have finished."""
    words = ["--interval", "0.2", "--retry_delay", "0", "--zones", A, "--workers_per_zone", "2"]
    script = str(ROOT / "scripts/watch_fleet.sh")
    call = [script, *words, "--delete_when_finished", "--json", "--", "--dataset_path", "d"]
    with subprocess.Popen(
        call, env=fleet.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        until(lambda: len(list(hosts.rglob("ran"))) == 2, 60)
        tpus.set_state(A, f"activations-{A}-1", "PREEMPTED")
        until(lambda: len(list(hosts.rglob("ran"))) == 3, 60)
        again = [path.read_text() for path in hosts.glob(f"*/activations-{A}-1/0/ran")]
        (tmp_path / "vm_bin/done").touch()
        stdout, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr
    assert again == ["worker=1\n--dataset_path\nd\n"] * 2
    assert '"result": "deleted"' in stdout
    assert tpus.nodes() == {}


def test_a_watch_leaves_a_worker_that_gave_up_and_ends_when_no_other_goes_on(fleet, tpus, hosts, tmp_path):
    gives_up = f'if [ "$TPU_WORKER_ID" = 0 ]; then echo >>{tmp_path}/tries; exit 2; fi\n'
    write_vm(tmp_path / "vm_bin", job=gives_up + "trap : TERM; sleep 3; exit 0\n")
    words = ("--watch", "--interval", "0.1", "--zones", A, "--workers_per_zone", "2", "--", "--x")
    done = fleet("launch", *words)
    assert (done.returncode, "not all with success" in done.stderr) == (1, True)
    assert len((tmp_path / "tries").read_text().splitlines()) == 1


def test_the_code_runs_from_the_bundle_alone(tmp_path):
    bundle = build_bundle(ROOT)
    with tarfile.open(fileobj=BytesIO(bundle.content)) as archive:
        archive.extractall(tmp_path, filter="data")
    call = [sys.executable, str(tmp_path / "extract_activations.py"), "--help"]
    assert subprocess.run(call, capture_output=True, cwd=tmp_path, check=False).returncode == 0
    kept = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in ("core", "analysis", "arc24")]
    assert all((tmp_path / path.relative_to(ROOT)).exists() for path in kept)


def test_the_bundle_is_a_function_of_the_code_and_holds_nothing_else(tmp_path):
    for name in ("setup.cfg", "constraints.txt", "pyproject.toml", "README.md", "LICENSE", "launchers/Dockerfile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for module in ("extract_activations", "create_dataset_streams", "analyze_activations", "prepare"):
        (tmp_path / f"{module}.py").write_text("")
    (tmp_path / "core/run").mkdir(parents=True)
    (tmp_path / "core/run/runner.py").write_text("x = 1\n")
    first = build_bundle(tmp_path)
    for name in (".env", "key.json", "notes.py", "core/token", "core/.netrc"):
        (tmp_path / name).write_text("secret")
    time.sleep(0.01)
    (tmp_path / "core/run/runner.py").touch()
    assert build_bundle(tmp_path) == first
    (tmp_path / "core/run/runner.py").write_text("x = 2\n")
    assert build_bundle(tmp_path).digest != first.digest


def test_worker_numbers_are_put_into_flags():
    flags, environment = flags_of_worker(["a{worker_id}", "{worker_id:03d}", "{other} {worker_id:0x}"], 7, 1)
    assert (flags, environment) == (["a7", "007", "{other} {worker_id:0x}"], {"TPU_WORKER_ID": "7"})


def test_states_are_read_among_what_ssh_prints():
    noise = "Using ssh batch size of 1.\nactivations-host\nactivations-host w0 running job1 since now\n\n"
    assert parse_states(noise) == (HostState("w0", "running", "job1", "since now"),)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["running", "waiting"], "running"),
        (["running", "finished"], "running"),
        (["finished", "finished"], "finished"),
        (["running", "failed"], "failed"),
        (["running", "stopped"], "stopped"),
        (["running"], "unreachable"),
        (["running", "dead"], None),
        (["running", "ended"], None),
        (["absent", "absent"], None),
    ],
)
def test_a_slice_is_what_its_hosts_are_together(states, expected):
    hosts = [HostState(f"w{i}", state, "job1", "-") for i, state in enumerate(states)]
    extraction, _ = state_of(hosts, "job1", 2)
    assert (extraction and str(extraction)) == expected
