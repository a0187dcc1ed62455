"""A gcloud that takes the documented flags of the calls that fleets make, and no others, and asks `fake_tpus`.

Its state is the file in FAKE_TPUS. ssh and scp work on folders below FAKE_HOSTS, one home for each host of a TPU.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fake_tpus import NODES, QUEUE, STOCKOUT, ApiError, FakeTpus

COLLECTIONS = {"tpu-vm": NODES, "queued-resources": QUEUE}
WIDE = {"zone", "project", "format", "quiet", "verbosity"}
# From `gcloud compute tpus tpu-vm|queued-resources VERB --help`, SDK 528, without flags that are not needed.
FLAGS = {
    "tpu-vm list": {"filter", "limit", "page-size", "sort-by", "uri"},
    "tpu-vm describe": set(),
    "tpu-vm create": {"version", "accelerator-type", "spot", "labels", "service-account", "async", "metadata"},
    "tpu-vm delete": {"async"},
    "tpu-vm ssh": {"worker", "command", "dry-run", "internal-ip", "ssh-flag", "ssh-key-file", "output-directory"},
    "tpu-vm scp": {"worker", "recurse", "compress", "dry-run", "internal-ip", "scp-flag", "ssh-key-file"},
    "queued-resources list": {"filter", "limit", "page-size", "sort-by", "uri"},
    "queued-resources describe": set(),
    "queued-resources create": {"runtime-version", "node-id", "accelerator-type", "spot", "labels", "service-account"},
    "queued-resources delete": {"async", "force"},
}
SWITCHES = {"quiet", "spot", "async", "force", "recurse", "compress", "dry-run", "internal-ip", "uri"}
REQUIRED = {
    "tpu-vm create": {"version", "accelerator-type"},
    "queued-resources create": {"runtime-version", "node-id", "accelerator-type"},
}
POSITIONALS = {"list": 0, "scp": 2}
HOSTS = {"v5litepod-16": 4, "v5litepod-64": 16}


def parse(words: list[str]) -> tuple[str, str, list[str], dict[str, str]]:
    """Group, verb, positionals and flags. Ends with gcloud's exit code 2 for anything that is not documented."""
    if words[:2] != ["compute", "tpus"] or f"{' '.join(words[2:4])}" not in FLAGS:
        refuse(f"Invalid choice: {words}")
    group, verb = words[2:4]
    known = FLAGS[f"{group} {verb}"] | WIDE
    positionals: list[str] = []
    flags: dict[str, str] = {}
    for word in words[4:]:
        name, separator, value = word.removeprefix("--").partition("=")
        if not word.startswith("-"):
            positionals.append(word)
        elif not word.startswith("--") or name not in known or name in flags or bool(separator) == (name in SWITCHES):
            refuse(f"unrecognized arguments: {word}")
        else:
            flags[name] = value
    if missing := ({"zone"} | REQUIRED.get(f"{group} {verb}", set())) - set(flags):
        refuse(f"argument --{min(missing)}: Must be specified.")
    if len(positionals) != POSITIONALS.get(verb, 1):
        refuse(f"unrecognized arguments: {positionals}")
    return group, verb, positionals, flags


def refuse(message: str) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    group, verb, positionals, flags = parse(sys.argv[1:])
    tpus, zone = FakeTpus(Path(os.environ["FAKE_TPUS"])), flags["zone"]
    name = positionals[-1].partition(":")[0] if positionals else group
    fault = tpus.note(verb, zone, name)
    try:
        misbehave(fault, zone)
        answer = run(tpus, group, verb, positionals, flags)
        misbehave("hang" if fault == "lost" else None, zone)
        tpus.meanwhile(fault)
    except ApiError as error:
        body = json.dumps({"code": error.code, "message": error.message}, indent=2)
        print(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) {error.status}: {body}", file=sys.stderr)
        sys.exit(1)
    if answer is not None:
        print(json.dumps(answer, indent=2)[: 40 if fault == "cut" else None])


def misbehave(fault: str | None, zone: str) -> None:
    """The scripted fault, before the call; or after it, when only its answer is lost."""
    if fault == "stockout":
        raise ApiError(8, "RESOURCE_EXHAUSTED", STOCKOUT.format(zone=zone))
    if fault == "unavailable":
        raise ApiError(14, "UNAVAILABLE", "The service is currently unavailable.")
    if fault == "denied":
        raise ApiError(7, "PERMISSION_DENIED", "Permission 'tpu.nodes.create' denied")
    if fault == "quota":
        raise ApiError(8, "RESOURCE_EXHAUSTED", "Quota limit 'TPUV5sPreemptibleLitepod' has been exceeded. Limit: 8")
    if fault == "hang":
        time.sleep(60)
    if fault == "garbage":
        print("<html>502 Bad Gateway</html>")
        sys.exit(0)
    if fault == "silence":
        sys.exit(0)
    if fault == "kill":
        os.kill(os.getppid(), signal.SIGKILL)  # the caller of gcloud
        sys.exit(1)
    if fault == "refused":
        print("ssh: connect to host 10.0.0.1 port 22: Connection refused", file=sys.stderr)
        sys.exit(255)


def run(tpus: FakeTpus, group: str, verb: str, positionals: list[str], flags: dict[str, str]) -> Any:
    """What the call prints as JSON; None when it prints nothing."""
    collection, zone = COLLECTIONS[group], flags["zone"]
    name = positionals[0] if positionals else ""
    if verb == "list":
        return tpus.list(collection, zone)
    if verb == "describe":
        return tpus.get(collection, zone, name)
    if verb == "create":
        node = {
            "acceleratorType": flags["accelerator-type"],
            "runtimeVersion": flags.get("version", flags.get("runtime-version")),
            "labels": dict(pair.split("=") for pair in flags.get("labels", "").split(",") if pair),
        }
        if collection == NODES:
            tpus.create_node(zone, name, node | {"schedulingConfig": {"spot": "spot" in flags}})
        else:
            spot: dict[str, Any] = {"spot": {}} if "spot" in flags else {}
            tpus.create_queued(zone, name, {"tpu": {"nodeSpec": [{"nodeId": flags["node-id"], "node": node}]}} | spot)
    elif verb == "delete" and collection == NODES:
        tpus.delete_node(zone, name)
    elif verb == "delete":
        tpus.delete_queued(zone, name, force="force" in flags)
    elif verb == "scp":
        source, target = positionals[0], positionals[1].partition(":")
        for home in homes(tpus, zone, target[0], flags):
            shutil.copy(source, home / target[2])
    elif verb == "ssh":
        ssh(tpus, zone, name, flags)
    return None


def homes(tpus: FakeTpus, zone: str, name: str, flags: dict[str, str]) -> list[Path]:
    """The home folders of the hosts that --worker names."""
    node = tpus.get(NODES, zone, name)
    if node["state"] != "READY":
        refuse(f"{name} is {node['state']}")
    hosts = HOSTS.get(node["acceleratorType"], 1)
    worker = flags.get("worker", "0")
    chosen = range(hosts) if worker == "all" else [int(worker)]
    paths = [Path(os.environ["FAKE_HOSTS"], node.get("id", "0"), name, str(number)) for number in chosen]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
    return paths


def ssh(tpus: FakeTpus, zone: str, name: str, flags: dict[str, str]) -> None:
    """Runs the command as each host would, in its own home."""
    running = []
    for home in homes(tpus, zone, name, flags):
        path = f"{os.environ['FAKE_VM_BIN']}:{re.sub(r'^[^:]*:', '', os.environ['PATH'])}"
        environment = {"HOME": str(home), "PATH": path, "FAKE_HOST": f"{name}-w{home.name}"}
        running.append(subprocess.Popen(["bash", "-c", flags["command"]], env=environment, cwd=home))
    if code := max(process.wait() for process in running):
        sys.exit(code)


if __name__ == "__main__":
    main()
