"""manage_tpus.sh against a strict stub of gcloud: what it does, and above all what it does not do."""

import os
import subprocess

import pytest

from fleet.command_line import main

A, B = "us-central1-a", "us-central1-b"
CHANGES = ("create", "delete", "scp", "ssh")


def name(zone: str, index: int) -> str:
    return f"activations-{zone}-{index}"


def test_the_documented_commands_work_as_written(fleet, tpus):
    both = f"{A},{B}"
    assert fleet("create", "--zones", both, "--workers_per_zone", "4", quick=()).returncode == 0
    assert fleet("status", "--zones", both, quick=()).stdout.count("READY") == 8
    tpus.set_state(A, name(A, 2), "PREEMPTED")
    assert fleet("recreate-preempted", "--zones", A, "--workers_per_zone", "4", quick=()).returncode == 0
    assert set(tpus.nodes().values()) == {"READY"}
    assert tpus.calls("delete") == [f"delete {A} {name(A, 2)}"]


def test_what_is_created_is_labelled_and_numbered_through_the_zones(fleet, tpus):
    fleet("create", "--zones", f"{A},{B}", "--workers_per_zone", "2", "--tpu_type", "v4-8", "--on-demand")
    labels = {key: node["labels"] for key, node in ((key, tpus.node(key)) for key in tpus.nodes())}
    workers = {key: label["activations-worker"] for key, label in labels.items()}
    assert {label["activations-fleet"] for label in labels.values()} == {"activations"}
    assert workers == {f"{z}/{name(z, i)}": str(n) for n, (z, i) in enumerate([(A, 0), (A, 1), (B, 0), (B, 1)])}
    one = tpus.node(f"{A}/{name(A, 0)}")
    kind = (one["acceleratorType"], one["runtimeVersion"], one["schedulingConfig"]["spot"])
    assert kind == ("v4-8", "tpu-ubuntu2204-base", False)


def test_create_twice_creates_once(fleet, tpus):
    for _ in range(2):
        assert fleet("create", "--zones", A, "--workers_per_zone", "2").returncode == 0
    assert len(tpus.calls("create")) == 2


def test_create_queued_twice_asks_once(fleet, tpus):
    for _ in range(2):
        assert fleet("create", "--zones", A, "--workers_per_zone", "2", "--queued").returncode == 0
    assert tpus.queue() == {f"{A}/{name(A, i)}": "ACCEPTED" for i in range(2)}
    assert len(tpus.calls("create")) == 2


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED"])
def test_what_cannot_start_again_is_deleted_and_created(fleet, tpus, state):
    tpus.put(A, name(A, 0), state)
    assert fleet("recreate-preempted", "--zones", A).returncode == 0
    assert tpus.nodes() == {f"{A}/{name(A, 0)}": "READY"}
    assert tpus.calls("delete", "create") == [f"{verb} {A} {name(A, 0)}" for verb in ("delete", "create")]


def test_only_the_preempted_is_touched_whatever_states_the_others_are_in(fleet, tpus):
    in_transition = ("CREATING", "RESTARTING", "REIMAGING", "REPAIRING", "STARTING", "STOPPING", "DELETING")
    for index, state in enumerate(["READY", "PREEMPTED", *in_transition, "HIDING", "UNHIDING"]):
        tpus.put(A, name(A, index), state)
    assert fleet("create", "--zones", A, "--workers_per_zone", "11").returncode == 0
    assert tpus.calls("delete", "create") == [f"{verb} {A} {name(A, 1)}" for verb in ("delete", "create")]


@pytest.mark.parametrize("state", ["STOPPED", "HIDDEN", "UNKNOWN", "A_STATE_OF_NEXT_YEAR"])
def test_what_only_a_person_can_decide_is_reported_and_left(fleet, tpus, state):
    tpus.put(A, name(A, 0), state)
    done = fleet("create", "--zones", A)
    assert done.returncode == 1
    assert "left alone" in done.stderr
    assert tpus.calls(*CHANGES) == []


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_dead_request_is_deleted_and_made_again(fleet, tpus, state):
    tpus.put_queued(A, name(A, 0), state)
    assert fleet("recreate-preempted", "--zones", A).returncode == 0
    assert tpus.queue() == {f"{A}/{name(A, 0)}": "ACCEPTED"}
    assert tpus.calls("delete", "create") == [f"{verb} {A} {name(A, 0)}" for verb in ("delete", "create")]


@pytest.mark.parametrize(
    "state", ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "SUSPENDING", "DELETING"]
)
def test_a_request_under_way_is_left_alone(fleet, tpus, state):
    tpus.put_queued(A, name(A, 0), state)
    assert fleet("create", "--zones", A).returncode == 0
    assert tpus.calls(*CHANGES) == []


def test_the_preempted_node_of_an_active_request_goes_with_its_request(fleet, tpus):
    tpus.put_queued(A, name(A, 0), "ACTIVE")
    tpus.put(A, name(A, 0), "PREEMPTED")
    assert fleet("recreate-preempted", "--zones", A).returncode == 0
    assert (tpus.queue(), tpus.nodes()) == ({f"{A}/{name(A, 0)}": "ACCEPTED"}, {})


def test_an_active_request_with_a_ready_node_is_left_alone(fleet, tpus):
    tpus.put_queued(A, name(A, 0), "ACTIVE")
    tpus.put(A, name(A, 0), "READY")
    assert fleet("create", "--zones", A).returncode == 0
    assert tpus.calls(*CHANGES) == []


@pytest.mark.parametrize("labels", [{}, {"activations-fleet": "of-another-project", "activations-worker": "0"}])
@pytest.mark.parametrize("command", ["create", "recreate-preempted", "delete"])
def test_a_tpu_without_our_label_is_a_conflict_and_untouched(fleet, tpus, command, labels):
    tpus.put(A, name(A, 0), "PREEMPTED", labels=labels)
    tpus.put(A, name(A, 1), "READY")
    done = fleet(command, "--zones", A, "--workers_per_zone", "2")
    assert done.returncode == 1
    assert "conflict" in done.stderr
    assert f"{A}/{name(A, 0)}" in tpus.nodes()
    assert not [call for call in tpus.calls(*CHANGES) if call.endswith(name(A, 0))]


def test_a_request_without_our_label_is_a_conflict_too(fleet, tpus):
    tpus.put_queued(A, name(A, 0), "FAILED", labels={"team": "other"})
    assert fleet("create", "--zones", A).returncode == 1
    assert tpus.calls(*CHANGES) == []


def test_a_tpu_that_changed_hands_since_the_listing_is_not_deleted(fleet, tpus):
    """The label is looked at again immediately before each deletion."""
    tpus.put(A, name(A, 0), "PREEMPTED")
    tpus.fail("list", "after give_away", name="tpu-vm")
    assert fleet("recreate-preempted", "--zones", A).returncode == 1
    assert tpus.calls("delete", "create") == []


def test_a_tpu_that_another_run_recreated_since_the_listing_is_not_deleted(fleet, tpus):
    tpus.put(A, name(A, 0), "PREEMPTED")
    tpus.fail("list", "after recover", name="tpu-vm")
    done = fleet("recreate-preempted", "--zones", A)
    assert (done.returncode, tpus.calls("delete", "create")) == (0, [])
    assert "changed meanwhile" in done.stderr


def test_a_crash_between_delete_and_create_heals_on_the_next_run(fleet, tpus):
    tpus.put(A, name(A, 0), "PREEMPTED", acceleratorType="v5litepod-16")
    tpus.put(A, name(A, 1), "READY", acceleratorType="v5litepod-16")
    tpus.fail("create", "kill")
    assert fleet("recreate-preempted", "--zones", A, "--workers_per_zone", "2").returncode == -9
    assert tpus.nodes() == {f"{A}/{name(A, 1)}": "READY"}
    assert fleet("recreate-preempted", "--zones", A, "--workers_per_zone", "2").returncode == 0
    healed = tpus.node(f"{A}/{name(A, 0)}")
    assert (healed["state"], healed["acceleratorType"]) == ("READY", "v5litepod-16"), "as its sibling is"
    assert healed["labels"]["activations-worker"] == "0"


def test_a_stockout_in_one_zone_does_not_stop_the_other(fleet, tpus):
    tpus.fail("create", "stockout", times=99, zone=A)
    done = fleet("create", "--zones", f"{A},{B}", "--workers_per_zone", "2", "--max_retries", "2")
    assert done.returncode == 1
    assert set(tpus.nodes()) == {f"{B}/{name(B, i)}" for i in range(2)}
    assert len([call for call in tpus.calls("create") if A in call]) == 2 * 3, "each tried once and again twice"
    assert "no more capacity" in done.stderr


def test_a_stockout_that_passes_is_waited_out(fleet, tpus):
    tpus.fail("create", "stockout", times=1)
    assert fleet("create", "--zones", A).returncode == 0


@pytest.mark.parametrize("fault", ["denied", "quota"])
def test_what_waiting_cannot_cure_is_not_repeated(fleet, tpus, fault):
    tpus.fail("create", fault, times=99)
    assert fleet("create", "--zones", A, "--max_retries", "5").returncode == 1
    assert len(tpus.calls("create")) == 1


@pytest.mark.parametrize("fault", ["garbage", "silence", "cut"])
@pytest.mark.parametrize("command", ["create", "recreate-preempted", "delete"])
def test_malformed_output_for_one_zone_changes_nothing_in_any(fleet, tpus, command, fault):
    tpus.put(A, name(A, 0), "PREEMPTED")
    tpus.put(B, "of-others", "READY", labels={})
    tpus.put_queued(B, "of-others", "ACTIVE", labels={})
    tpus.fail("list", fault, zone=B)
    done = fleet(command, "--zones", f"{A},{B}", "--workers_per_zone", "1")
    assert (done.returncode, tpus.calls(*CHANGES)) == (1, [])
    assert done.stderr.startswith("error: gcloud's answer about")
    assert len(done.stderr.splitlines()) == 1


def test_all_zones_are_listed_before_the_first_change(fleet, tpus):
    fleet("create", "--zones", f"{A},{B}")
    verbs = [call.split()[0] for call in tpus.calls()]
    assert verbs == sorted(verbs, key=("list", "create").index)


def test_a_call_that_hangs_is_given_up_and_repeated(fleet, tpus):
    tpus.fail("list", "hang", times=1, zone=A)
    assert fleet("create", "--zones", A, "--gcloud_timeout", "1").returncode == 0
    assert len(tpus.calls("create")) == 1


def test_a_create_whose_answer_is_lost_recognises_its_own_tpu(fleet, tpus):
    tpus.fail("create", "lost")
    assert fleet("create", "--zones", A, "--gcloud_timeout", "1").returncode == 0
    assert tpus.nodes() == {f"{A}/{name(A, 0)}": "READY"}


def test_a_service_that_stays_away_is_given_up_after_max_retries(fleet, tpus):
    tpus.fail("list", "unavailable", times=99)
    assert fleet("create", "--zones", A, "--max_retries", "2").returncode == 1
    assert len(tpus.calls("list")) == 2 * 3


@pytest.mark.parametrize("command", ["create", "recreate-preempted", "delete"])
def test_a_dry_run_says_what_it_would_do_and_does_nothing(fleet, tpus, command):
    tpus.put(A, name(A, 0), "PREEMPTED")
    before = tpus.nodes()
    done = fleet(command, "--zones", A, "--workers_per_zone", "2", "--dry-run")
    assert (done.returncode, tpus.nodes(), tpus.calls(*CHANGES)) == (0, before, [])
    assert f"would run: gcloud compute tpus tpu-vm delete {name(A, 0)} --zone={A}" in done.stderr


def test_delete_takes_the_fleet_and_nothing_else(fleet, tpus):
    tpus.put(A, name(A, 0), "READY")
    tpus.put_queued(A, name(A, 1), "WAITING_FOR_RESOURCES")
    tpus.put_queued(A, name(A, 2), "ACTIVE")
    tpus.put(A, name(A, 2), "READY")
    tpus.put(A, "precious", "READY", labels={})
    assert fleet("delete", "--zones", A).returncode == 0
    assert (tpus.nodes(), tpus.queue()) == ({f"{A}/precious": "READY"}, {})


def test_status_and_list_change_nothing_and_print_json(fleet, tpus):
    tpus.put(A, name(A, 0), "PREEMPTED")
    tpus.put(B, name(B, 0), "READY")
    status = fleet.json("status", "--zones", A, "--workers_per_zone", "2")
    assert [(tpu["state"], tpu["action"]) for tpu in status] == [("PREEMPTED", "recreate"), ("ABSENT", "create")]
    assert [tpu["zone"] for tpu in fleet.json("list")] == [A, B], "in all zones"
    assert {call.split()[0] for call in tpus.calls()} == {"list"}


def test_recreated_tpus_keep_type_runtime_kind_and_worker(fleet, tpus):
    labels = {"activations-fleet": "activations", "activations-worker": "7"}
    kept = {"acceleratorType": "v6e-4", "runtimeVersion": "v2-alpha-tpuv6e-x", "schedulingConfig": {"spot": False}}
    tpus.put(A, name(A, 3), "PREEMPTED", labels=labels, **kept)
    assert fleet("recreate-preempted", "--zones", A).returncode == 0
    made = tpus.node(f"{A}/{name(A, 3)}")
    assert {field: made[field] for field in kept} == kept
    assert made["labels"] == labels


def test_two_tpus_are_never_the_same_worker(fleet, tpus):
    tpus.put(A, name(A, 1), "READY", labels={"activations-fleet": "activations", "activations-worker": "0"})
    done = fleet("create", "--zones", A, "--workers_per_zone", "2")
    assert (done.returncode, tpus.calls("create")) == (1, [])
    assert "would both be worker 0" in done.stderr


def test_a_new_tpu_among_several_types_has_to_be_told_its_own(fleet, tpus):
    tpus.put(A, name(A, 0), "READY", acceleratorType="v5litepod-8")
    tpus.put(A, name(A, 1), "READY", acceleratorType="v6e-8")
    asked = fleet("create", "--zones", A, "--workers_per_zone", "3")
    assert (asked.returncode, tpus.calls("create")) == (2, [])
    assert fleet("status", "--zones", A, "--workers_per_zone", "3").returncode == 0
    assert fleet("create", "--zones", A, "--workers_per_zone", "3", "--tpu_type", "v6e-8").returncode == 0


HOSTILE = [
    ("--zones", "projects/other/locations/us-central1-a"),
    ("--zones", "us-central1-a;reboot"),
    ("--zones", "us-central1-a,"),
    ("--zones", "us-central1-a,us-central1-a"),
    ("--zones", "us-central1-a\n"),
    ("--zones", "US-CENTRAL1-A"),
    ("--zones", "--project=other"),
    ("--zones", ""),
    ("--fleet", "projects/other/locations/us-central1-a/nodes/w"),
    ("--fleet", "a$(reboot)"),
    ("--fleet", "a b"),
    ("--fleet", "1a"),
    ("--fleet", "a-"),
    ("--fleet", "a" * 41),
    ("--fleet", "a" * 30),  # fits alone, not with zone and number
    ("--tpu_type", "v5litepod-12"),
    ("--tpu_type", "v7x-8"),
    ("--tpu_type", "v4-8 --spot"),
    ("--tpu_type", "v4-٨"),
    ("--runtime", "../v2"),
    ("--runtime", "-alpha"),
    ("--workers_per_zone", "0"),
    ("--workers_per_zone", "-1"),
    ("--workers_per_zone", "1e3"),
    ("--workers_per_zone", "٣"),
    ("--workers_per_zone", "513"),
    ("--project", "a/b"),
    ("--project", "--impersonate-service-account=x"),
    ("--max_retries", "many"),
    ("--retry_delay", "nan"),
    ("--service_account", "someone"),
    ("--zone", "us-central1-a"),  # no abbreviation and no unknown flag
]


def exit_code(words: list[str]) -> object:
    try:
        return main(words)
    except SystemExit as error:  # argparse's own refusals
        return error.code


@pytest.mark.parametrize(("flag", "value"), HOSTILE)
@pytest.mark.parametrize("command", ["create", "launch"])
def test_hostile_values_are_refused_before_any_call(fleet, tpus, command, flag, value, capsys):
    zones = [] if flag == "--zones" else ["--zones", A]
    code = exit_code([command, *zones, "--workers_per_zone", "2", flag, value])
    assert (code, tpus.calls()) == (2, [])
    assert capsys.readouterr().err


@pytest.mark.parametrize("value", ["projects/p/locations/z/nodes/w", "w;reboot", "-w", "W"])
def test_ssh_refuses_hostile_names_before_any_call(fleet, tpus, value):
    done = fleet("ssh", value, "--zones", A)
    assert (done.returncode, tpus.calls()) == (2, [])


def test_quoting_survives_the_shell_script(fleet, tpus):
    done = fleet("create", "--zones", "us-central1-a $(touch pwned) `id`", "--workers_per_zone", "1")
    assert (done.returncode, tpus.calls()) == (2, [])


def test_a_refused_command_line_is_one_line_without_its_secrets(fleet, tpus):
    done = fleet("create", "--zones", A, "--hub_token", "hf_averysecrettokenindeed", "--more\x1b[2J")
    assert (done.returncode, tpus.calls(), done.stderr.count("\n")) == (2, [], 1)
    assert done.stderr.startswith("error: unrecognized arguments: --hub_token *** --more?[2J")


def test_without_gcloud_there_is_one_line(fleet, tmp_path):
    path = tmp_path / "empty"
    path.mkdir()
    for tool in ("bash", "dirname"):
        (path / tool).symlink_to(f"/bin/{tool}" if os.path.exists(f"/bin/{tool}") else f"/usr/bin/{tool}")
    fleet.environment["PATH"] = str(path)
    done = fleet("list")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "gcloud is not installed" in done.stderr


def test_modules_where_the_user_stands_are_not_taken_for_ours(fleet, tmp_path):
    for module in ("fleet", "json", "argparse"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('hijacked')")
    script = str(os.path.join(os.path.dirname(__file__), "../../scripts/manage_tpus.sh"))
    done = subprocess.run([script, "list"], cwd=tmp_path, env=fleet.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
