"""Tasks on the machines of a Ray cluster: `pip install -c constraints.txt -e '.[ray]'`.

Every machine needs this code at the same version (`ray job submit --working-dir .` sends it) and must reach the output:
a bucket, or a disk that all of them mount.
"""

import itertools
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from analysis.passes.runners.base import Item, Output
from analysis.passes.runners.blas_threads import one_blas_thread
from core.base.command_line import configure_logging
from core.base.errors import RunError

# A task whose machine died is started again on another one, so many times.
_RETRIES = 10
_CONNECT_S = 10.0


@dataclass(frozen=True)
class RayRunner:
    """address: see `RunnerChoice`. tasks: under way at once; None: one for each core of the cluster."""

    address: str | None = None
    tasks: int | None = None

    def run(self, task: Callable[[Item], Output], items: Iterable[Item]) -> Iterator[Output]:
        """See `Runner`. Outputs are fetched one by one, and each leaves Ray's object store before the next."""
        ray = _ray()
        is_ours = not ray.is_initialized()
        if is_ours:
            _connect(ray, self.address)
        try:
            limit = self.tasks or max(1, int(ray.cluster_resources().get("CPU", 1)))
            yield from _completed(ray, task, items, limit)
        finally:
            if is_ours:
                ray.shutdown()


def _completed(ray: Any, task: Callable[[Item], Output], items: Iterable[Item], limit: int) -> Iterator[Output]:
    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(_apply)
    shared, waiting = ray.put(task), iter(items)
    pending = [remote.remote(shared, item) for item in itertools.islice(waiting, limit)]
    while pending:
        (done, *_), pending = ray.wait(pending, num_returns=1)
        # The next item begins while the caller is busy with this output.
        pending += [remote.remote(shared, item) for item in itertools.islice(waiting, 1)]
        output = _fetched(ray, done)
        del done
        yield output
        del output


def _apply(task: Callable[[Item], Output], item: Item) -> Output:
    configure_logging()
    with one_blas_thread():
        return task(item)


def _fetched(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ray.exceptions.RayError):
            raise RunError(f"a Ray worker failed: {_line(error.cause)}") from error
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RunError(f"Ray lost a task: {_line(error)}; run the same command again to continue") from error


def _connect(ray: Any, address: str | None) -> None:
    if address is not None:
        _require_listener(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(f"--ray_address {address}: {_line(error)}") from error


def _require_listener(address: str) -> None:
    """Ray itself waits for minutes where nothing listens."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), _CONNECT_S).close()
    except OSError as error:
        raise RunError(f"--ray_address {address}: nothing listens there ({error.strerror or error})") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        raise RunError("runner ray needs Ray: pip install -c constraints.txt -e '.[ray]'") from error
    return ray
