"""Checks that the folders that share a stream have each of its lines once: no share twice, none missing."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from core.base.canonical_json import canonical_json
from core.commit.identity import StreamIdentity

_SHOWN_MACHINES = 8


@dataclass(frozen=True)
class ShareFaults:
    """`problems` cannot be fixed by further runs; `unfinished` are shares that may still be run."""

    problems: tuple[str, ...]
    unfinished: tuple[str, ...]


def share_faults(streams: Mapping[str, StreamIdentity]) -> ShareFaults:
    """Conflicting and missing shares among folders; `streams`: by folder, the lines that it has.

    Folders share a stream when its identity and the position of its first line are equal.
    """
    groups: dict[bytes, dict[str, StreamIdentity]] = defaultdict(dict)
    for folder, stream in sorted(streams.items()):
        groups[canonical_json([stream.identity, stream.first_position])][folder] = stream
    return ShareFaults(
        tuple(fault for group in groups.values() for fault in _conflicts(group)),
        tuple(fault for group in groups.values() for fault in _missing_shares(group)),
    )


def _conflicts(group: Mapping[str, StreamIdentity]) -> Iterator[str]:
    name = _stream_name(group)
    totals = {stream.total_machines for stream in group.values()}
    limits = {stream.max_tasks for stream in group.values()}
    if len(totals) > 1:
        yield (
            f"{name} is cut into different shares ({_listed(group)}): samples are stored twice or missing; "
            "keep the folders of one --total_machines"
        )
    if len(limits) > 1:
        yield f"{name} is cut by different --max_tasks ({_listed(group)}): keep the folders of one --max_tasks"
    holders: dict[tuple[int, int], list[str]] = defaultdict(list)
    for folder, stream in group.items():
        holders[stream.machine_id, stream.total_machines].append(folder)
    for (machine, total), folders in holders.items():
        if len(folders) > 1:
            yield (
                f"{' and '.join(folders)} have the same lines of {name} (machine {machine} of {total}): "
                "their samples are stored twice; keep one of these folders"
            )


def _missing_shares(group: Mapping[str, StreamIdentity]) -> Iterator[str]:
    totals = {stream.total_machines for stream in group.values()}
    if len(totals) > 1:
        return
    total = totals.pop()
    present = {stream.machine_id for stream in group.values()}
    if len(present) < total:
        missing = islice((machine for machine in range(total) if machine not in present), _SHOWN_MACHINES)
        more = f" and {total - len(present) - _SHOWN_MACHINES} more" * (total - len(present) > _SHOWN_MACHINES)
        yield (
            f"{_stream_name(group)}: the lines of machine {', '.join(map(str, missing))}{more} of {total} are missing: "
            "also run the extraction with those --machine_id"
        )


def _listed(group: Mapping[str, StreamIdentity]) -> str:
    return ", ".join(
        f"{folder}: machine {stream.machine_id} of {stream.total_machines}, "
        + ("all tasks" if stream.max_tasks is None else f"{stream.max_tasks} tasks")
        for folder, stream in group.items()
    )


def _stream_name(group: Mapping[str, StreamIdentity]) -> str:
    return str(next(iter(group.values())).identity.get("name", "a stream"))
