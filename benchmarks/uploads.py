"""How much of the rate of an upload alone a run keeps up that encodes, digests and commits meanwhile."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bucket import bucket_server
from benchmarks.engine import Engine
from benchmarks.measuring import Ratio, alternate
from core.errors import RunError
from core.object_store import Created, ObjectInfo, ObjectStore, file_info, open_store

# As many as a run has under way.
_UPLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class UploadResult:
    """`link_mb_s` 0: as fast as loopback is. `ratio` is the time of the upload alone over that of the run."""

    link_mb_s: float
    files: int
    bytes: int
    raw_mb_s: float
    run_mb_s: float
    ratio: Ratio


def measure_upload(engine: Engine, stored: Sequence[Path], link_mb_s: float, repeats: int) -> UploadResult:
    """In turns: uploads what `engine` once stored as it is, and runs the engine into the bucket.

    The engine's device should take no time (`benchmarks.replay`), or it is what is measured.
    """
    files = {path: file_info(path) for path in stored}
    million = sum(info.size for info in files.values()) / 1e6
    with bucket_server(link_mb_s) as url:
        serial = iter(range(1 << 30))
        sides: dict[str, Callable[[], object]] = {
            "raw": lambda: upload(files, open_store(f"{url}/raw_{next(serial)}")),
            "run": lambda: engine.run(f"{url}/run_{next(serial)}"),
        }
        sides["run"]()
        timings = alternate(sides, repeats)
    return UploadResult(
        link_mb_s=link_mb_s,
        files=len(files),
        bytes=sum(info.size for info in files.values()),
        raw_mb_s=round(million / timings["raw"].seconds, 1),
        run_mb_s=round(million / timings["run"].seconds, 1),
        ratio=Ratio.of(timings["raw"], timings["run"]),
    )


def upload(files: dict[Path, ObjectInfo], store: ObjectStore) -> None:
    """Every file under its name, several at once."""
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        outcomes = pool.map(lambda item: store.create_file(item[0].name, *item), files.items())
        check_created(list(outcomes))


def check_created(outcomes: Sequence[Created]) -> None:
    """Raises RunError when a name was taken: then less was uploaded than is counted."""
    if any(outcome is not Created.CREATED for outcome in outcomes):
        raise RunError("the bucket of the benchmark held a file already")
