"""The claiming workers of an extraction as actors of a Ray cluster, on its TPU or GPU nodes.

    ray job submit --address http://head:8265 --working-dir . -- python launchers/ray_job.py --workers 16 \\
        --resources TPU=4 -- --use_sharded_dataset --sharded_dataset_dir gs://your-bucket/sharded_dataset \\
        --upload_to_gcs --gcs_bucket your-bucket

Each actor runs `extract_activations.py` with a WORKER_ID of its own, in a process of its own. An actor that dies, with
its node or alone, is started again on any node that has the resources; the leases make that safe, also where the old
process is still alive. The flags after `--` go to every worker. A worker whose exit code is not 0 is started again,
`--restarts` times; wrong usage is not. The job ends when all workers have ended, with 0 or the largest exit code.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

USAGE = 2
_PR_SET_PDEATHSIG = 1  # prctl(2)
_ALWAYS = -1


class ExtractionWorker:
    """The actor: starts the command and waits for it."""

    def run(self, worker_id: int, flags: Sequence[str], restarts: int) -> int:
        """The last exit code of `extract_activations.py`, which is begun again after a failure."""
        for _ in range(restarts + 1):
            code = _extract(worker_id, flags)
            if code in (0, USAGE):
                break
        return code


def _extract(worker_id: int, flags: Sequence[str]) -> int:
    script = Path(__file__).resolve().parents[1] / "extract_activations.py"
    environment = os.environ | {"WORKER_ID": str(worker_id)}
    # The flag is above TPU_WORKER_ID, which a TPU VM may have set: the index of a host, not of a worker.
    argv = [sys.executable, str(script), *flags, "--worker_id", str(worker_id)]
    return subprocess.run(argv, env=environment, preexec_fn=_end_with_parent, check=False).returncode


def _end_with_parent() -> None:
    """Where the actor is killed, its command gets SIGTERM: it commits what is computed and releases its lease."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_workers(ray: Any, workers: int, flags: Sequence[str], resources: Mapping[str, float], restarts: int) -> int:
    """Starts the workers and waits for all; the largest exit code, 1 for a worker whose actor was lost for good.

    ray: the package, connected. resources: of each worker, with `CPU` and `GPU` as Ray names them.
    """
    own = dict(resources)
    options = {"num_cpus": own.pop("CPU", 1), "num_gpus": own.pop("GPU", 0), "resources": own}
    actor = ray.remote(max_restarts=_ALWAYS, max_task_retries=_ALWAYS, **options)(ExtractionWorker)
    actors = [actor.remote() for _ in range(workers)]
    runs = {each.run.remote(i, list(flags), restarts): i for i, each in enumerate(actors)}
    codes = []
    while runs:
        (done, *_), _ = ray.wait(list(runs), num_returns=1)
        worker = runs.pop(done)
        codes.append(_code_of(ray, done, worker))
        # Its resources are for a worker that lost its node.
        ray.kill(actors[worker])
    return max(codes)


def _code_of(ray: Any, run: Any, worker: int) -> int:
    try:
        code = ray.get(run)
    except ray.exceptions.RayError as error:
        print(f"worker {worker} was lost: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"worker {worker} ended with exit code {code}", file=sys.stderr)
    # A signal's number is negative there.
    return code if code >= 0 else 128 - code


def build_parser() -> argparse.ArgumentParser:
    """Its flags, before `--`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, required=True, help="actors, and so worker ids 0 to N - 1")
    parser.add_argument(
        "--resources", nargs="*", default=[], metavar="NAME=AMOUNT", help="of each, such as TPU=4, GPU=1"
    )
    parser.add_argument("--restarts", type=int, default=3, help="of a worker that fails (default 3)")
    parser.add_argument("--ray_address", help="of the cluster (default that of the job, or of the environment)")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; `--` divides ours from those of the extraction."""
    place = argv.index("--") if "--" in argv else len(argv)
    parser = build_parser()
    args = parser.parse_args(argv[:place])
    args.flags = list(argv[place + 1 :])
    pairs = [text.partition("=") for text in args.resources]
    try:
        args.resources = {name: float(amount) for name, _, amount in pairs}
    except ValueError:
        parser.error(f"--resources {' '.join(args.resources)}: expected NAME=AMOUNT, such as TPU=4")
    if args.workers < 1 or args.restarts < 0:
        parser.error("--workers must be above 0, and --restarts not negative")
    if "--use_sharded_dataset" not in args.flags:
        parser.error("the workers divide a sharded dataset: give -- --use_sharded_dataset --sharded_dataset_dir …")
    return args


def main() -> None:
    """Runs the workers on the cluster."""
    args = parse(sys.argv[1:])
    import ray

    ray.init(address=args.ray_address)
    sys.exit(run_workers(ray, args.workers, args.flags, args.resources, args.restarts))


if __name__ == "__main__":
    main()
