"""The decisions: pure functions, every state."""

import json

import pytest
from fake_tpus import NODES, QUEUE
from hypothesis import given, settings
from hypothesis import strategies as st

from core.base.errors import RunError
from fleet.decisions import NODE_ACTIONS, QUEUE_ACTIONS, Action, Wishes, decide, machine_for, wanted_slots
from fleet.gcloud.accelerators import hosts_of, require_tpu_type, runtime_of
from fleet.gcloud.calls import Failure, meaning_of
from fleet.gcloud.listing import Kind, Resource, inventory, parse_list
from fleet.gcloud.machines import Machine, Slot
from fleet.reconciling import Result, delete

A, B = "us-central1-a", "us-central1-b"
V5E = Machine("v5litepod-8", "v2-alpha-tpuv5-lite", True, False)
# The enumerations of the TPU API v2: Node.State and QueuedResourceState.State.
NODE_STATES = ["STATE_UNSPECIFIED", "CREATING", "READY", "RESTARTING", "REIMAGING", "DELETING", "REPAIRING", "STOPPED"]
NODE_STATES += ["STOPPING", "STARTING", "PREEMPTED", "TERMINATED", "HIDING", "HIDDEN", "UNHIDING", "UNKNOWN"]
QUEUE_STATES = ["STATE_UNSPECIFIED", "CREATING", "ACCEPTED", "PROVISIONING", "FAILED", "DELETING", "ACTIVE"]
QUEUE_STATES += ["SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES"]


def resource(kind: Kind, state: str, name: str = f"f-{A}-0", fleet: str = "f", worker: int = 0) -> Resource:
    labels = {"activations-fleet": fleet, "activations-worker": str(worker)}
    return Resource(kind, name, A, state, labels, V5E.tpu_type, V5E.runtime, True)


def action_for(*resources: Resource) -> Action:
    (decision,) = decide("f", wanted_slots("f", (A,), 1, 0), inventory(resources), Wishes())
    return decision.action


def test_every_state_of_the_api_has_its_action():
    assert set(NODE_ACTIONS) == set(NODE_STATES)
    assert set(QUEUE_ACTIONS) == set(QUEUE_STATES) - {"ACTIVE"}


@given(st.sampled_from([*NODE_STATES, "NEW", ""]), st.sampled_from([None, *QUEUE_STATES, "NEW"]))
def test_only_what_is_lost_for_good_is_ever_deleted(node_state, queue_state):
    queued = [] if queue_state is None else [resource(Kind.QUEUED, queue_state)]
    action = action_for(resource(Kind.NODE, node_state), *queued)
    lost = queue_state in ("FAILED", "SUSPENDED")
    lost = lost or (queue_state in (None, "ACTIVE") and node_state in ("PREEMPTED", "TERMINATED"))
    assert (action is Action.RECREATE) == lost
    assert action is not Action.CREATE


@given(st.sampled_from(NODE_STATES), st.sampled_from(QUEUE_STATES), st.booleans())
def test_one_foreign_label_is_enough_for_a_conflict(node_state, queue_state, node_is_ours):
    node = resource(Kind.NODE, node_state, fleet="f" if node_is_ours else "g")
    queued = resource(Kind.QUEUED, queue_state, fleet="g" if node_is_ours else "f")
    assert action_for(node, queued) is Action.CONFLICT


def test_names_and_numbers_follow_the_order_of_the_zones():
    slots = wanted_slots("f", (B, A), 2, 10)
    assert [(slot.name, slot.worker_id) for slot in slots] == [
        (f"f-{B}-0", 10),
        (f"f-{B}-1", 11),
        (f"f-{A}-0", 12),
        (f"f-{A}-1", 13),
    ]


def test_a_new_tpu_is_like_the_others_or_as_the_flags_say():
    others = [Machine("v4-8", "tpu-ubuntu2204-base", False, True)]
    assert machine_for(Wishes(), None, others) == others[0]
    assert machine_for(Wishes(), None, []) == V5E
    assert machine_for(Wishes(spot=True, queued=False), None, others) == Machine("v4-8", others[0].runtime, True, False)
    assert machine_for(Wishes(tpu_type="v6e-8"), V5E, others) == Machine("v6e-8", "v2-alpha-tpuv6e", True, False)


def test_among_tpus_of_several_types_a_new_one_has_to_be_told_its_own():
    several = [V5E, Machine("v6e-8", "v2-alpha-tpuv6e", True, False)]
    assert machine_for(Wishes(), None, several) is None
    assert machine_for(Wishes(tpu_type="v6e-8"), None, several) == several[1]
    assert machine_for(Wishes(), V5E, several) == V5E, "one that is recreated stays what it was"


def test_what_a_lost_tpu_was_is_remembered():
    slots = wanted_slots("f", (A,), 1, 0)
    was = Machine("v6e-16", "v2-alpha-tpuv6e", False, True)
    (decision,) = decide("f", slots, inventory([]), Wishes(), {slots[0].name: was})
    assert (decision.action, decision.machine) == (Action.CREATE, was)


@pytest.mark.parametrize(
    ("tpu_type", "hosts"),
    [
        ("v2-8", 1),
        ("v3-32", 4),
        ("v4-8", 1),
        ("v4-64", 8),
        ("v5litepod-1", 1),
        ("v5litepod-4", 1),
        ("v5litepod-8", 1),
        ("v5litepod-16", 4),
        ("v5litepod-64", 16),
        ("v5litepod-256", 64),
        ("v5p-8", 1),
        ("v5p-128", 16),
        ("v6e-8", 1),
        ("v6e-64", 16),
    ],
)
def test_hosts_of_a_slice(tpu_type, hosts):
    assert hosts_of(require_tpu_type(tpu_type)) == hosts
    assert runtime_of(tpu_type)


class ForeignInTheListing:
    """A gcloud that describes a TPU as ours that was listed as another fleet's; deleting is an error."""

    dry_run = False

    def describe(self, kind: Kind, slot: Slot) -> Resource:
        return resource(kind, "READY")

    def stop(self) -> None:
        """Nothing runs."""


def test_the_listing_alone_is_enough_to_leave_a_tpu_to_its_owner():
    foreign = resource(Kind.NODE, "READY", fleet="g")
    (outcome,) = delete(ForeignInTheListing(), "f", [(Slot(foreign.name, A, 0), foreign)])  # type: ignore[arg-type]
    assert outcome.result is Result.CONFLICT


def record(collection: str, zone: str = A, name: str = "n", **fields: object) -> dict[str, object]:
    return {"name": f"projects/p/locations/{zone}/{collection}/{name}"} | fields


MALFORMED = [
    "",
    "null",
    "{}",
    "[1]",
    '[{"name": ',
    "Listed 0 items.",
    json.dumps([{}]),
    json.dumps([record(NODES, zone=B)]),
    json.dumps([record(QUEUE)]),
    json.dumps([record(NODES, name="")]),
    json.dumps([record(NODES, name="a/b")]),
    json.dumps([record(NODES, state=7)]),
    json.dumps([record(NODES, labels=["a"])]),
    json.dumps([record(NODES, labels={"a": 1})]),
    json.dumps([record(NODES, schedulingConfig="spot")]),
    "[" * 100_000,
]


@pytest.mark.parametrize("text", MALFORMED, ids=range(len(MALFORMED)))
def test_a_listing_that_is_not_understood_in_full_is_refused(text):
    with pytest.raises(RunError, match="nothing was changed"):
        parse_list(text, Kind.NODE, A)


@pytest.mark.parametrize(
    "fields", [{"state": "ACTIVE"}, {"tpu": []}, {"tpu": {"nodeSpec": {}}}, {"tpu": {"nodeSpec": [1]}}]
)
def test_a_queue_that_is_not_understood_in_full_is_refused(fields):
    with pytest.raises(RunError, match="nothing was changed"):
        parse_list(json.dumps([record(QUEUE, **fields)]), Kind.QUEUED, A)


def test_a_request_for_several_nodes_is_never_taken_for_ours():
    node = {"node": {"labels": {"activations-fleet": "f"}}}
    text = json.dumps([record(QUEUE, tpu={"nodeSpec": [node, node]}, state={"state": "FAILED"})])
    assert [thing.fleet for thing in parse_list(text, Kind.QUEUED, A)] == [None]


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_read_or_refused(value):
    for kind in Kind:
        try:
            parse_list(json.dumps(value), kind, A)
        except RunError:
            continue


def test_a_name_listed_twice_is_refused():
    with pytest.raises(RunError, match="twice"):
        inventory([resource(Kind.NODE, "READY"), resource(Kind.NODE, "PREEMPTED")])


@pytest.mark.parametrize(
    ("stderr", "failure"),
    [
        (
            '{"code": 8, "message": "There is no more capacity in the zone \\"us-central1-a\\"; try another"}',
            "CAPACITY",
        ),
        ("Insufficient reserved capacity. Contact customer support to increase your reservation.", "CAPACITY"),
        ("RESOURCE_EXHAUSTED: the zone 'us-central1-a' is stocked out", "CAPACITY"),
        ("Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 8", "REFUSED"),
        ("Quota 'TPUV4sPreemptiblePodPerProjectPerRegionForTPUAPI' exhausted. Limit 20800 in region", "REFUSED"),
        ("ALREADY_EXISTS: Resource 'projects/p/locations/z/nodes/n' already exists", "EXISTS"),
        ("NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found", "GONE"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "REFUSED"),
        ("UNAVAILABLE: The service is currently unavailable.", "TRANSIENT"),
        ("HTTPError 503: Service Unavailable", "TRANSIENT"),
        ("gcloud crashed (ConnectionError): HTTPSConnectionPool(host='tpu.googleapis.com', port=443)", "TRANSIENT"),
        ("a message that is not known", "REFUSED"),
    ],
)
def test_what_gcloud_says_is_understood(stderr, failure):
    assert meaning_of(stderr) is Failure[failure]
