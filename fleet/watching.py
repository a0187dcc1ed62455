"""Repeats reconcile and launch until the dataset is finished."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.base.errors import RunError, UsageError
from fleet.launching import ExtractionState, Launched
from fleet.reconciling import Outcome

_ENDED = {ExtractionState.FINISHED, ExtractionState.FAILED, ExtractionState.STOPPED}


@dataclass(frozen=True)
class Round:
    """The results of one round: for the TPUs, and for the extraction on ready ones."""

    outcomes: tuple[Outcome, ...]
    launched: tuple[Launched, ...]

    @property
    def has_ended(self) -> bool:
        """Whether every wanted TPU exists and every extraction has ended for good."""
        ended = bool(self.launched) and all(launched.extraction in _ENDED for launched in self.launched)
        return ended and len(self.launched) == len(self.outcomes)

    @property
    def has_finished(self) -> bool:
        """Whether every extraction has finished."""
        return self.has_ended and all(launched.extraction is ExtractionState.FINISHED for launched in self.launched)


@dataclass(frozen=True)
class Verdict:
    """How a watch ended: whether the dataset is finished, a message, and the last round."""

    ok: bool
    message: str
    last: Round


def watch(
    one_round: Callable[[], Round], finished: Callable[[Round], bool | None], wait: Callable[[], None]
) -> Verdict:
    """Runs rounds until the dataset is finished, or until there is nothing left to wait for.

    `finished` returns None when it cannot tell; then the dataset is finished once every worker is. A failed round is
    logged and repeated, except for a UsageError, since wrong flags stay wrong.
    """
    while True:
        verdict = None
        try:
            last = one_round()
            verdict = _verdict(last, finished(last))
        except UsageError:
            raise
        except RunError as error:
            logging.warning("%s; the next round tries again", error)
        if verdict is not None:
            return verdict
        wait()


def _verdict(last: Round, done: bool | None) -> Verdict | None:
    """None while there is something to wait for."""
    if done or (done is None and last.has_finished):
        return Verdict(True, "the dataset is finished", last)
    if last.has_finished:
        return Verdict(False, "every worker has ended, but the dataset is not finished: run verify to see why", last)
    if last.has_ended:
        return Verdict(
            False, "every worker has ended, not all with success: see manage_tpus.sh logs, then launch again", last
        )
    return None


def output_url(flags: Sequence[str]) -> str | None:
    """The output of the extraction with these flags if it is a gs:// URL, else None."""
    bucket, folder = _value(flags, "--gcs_bucket"), _value(flags, "--output_dir")
    if bucket and ("--upload_to_gcs" in flags or "--use_sharded_dataset" in flags):
        prefix = (_value(flags, "--gcs_prefix") or "activations").strip("/")
        return "/".join(part for part in (f"gs://{bucket}", prefix) if part)
    return folder if folder and folder.startswith("gs://") else None


def _value(flags: Sequence[str], name: str) -> str | None:
    """The last value of a flag, as `--name value` or `--name=value`."""
    found = None
    for position, flag in enumerate(flags):
        if flag == name:
            found = "".join(flags[position + 1 : position + 2])
        elif flag.startswith(f"{name}="):
            found = flag.partition("=")[2]
    return found


def dataset_finished(url: str, root: Path, workers_ended: bool) -> bool | None:
    """Whether the output at `url` holds the whole dataset; None when this machine cannot tell.

    Reads the field `finished` of `analyze_activations.py status URL --json`. If that gives no answer and all workers
    have ended, `verify URL` decides; it reads every shard.
    """
    status = _analysis(root, "status", url)
    if status is not None and isinstance(status.get("finished"), bool):
        return bool(status["finished"])
    if not workers_ended:
        return None
    report = _analysis(root, "verify", url)
    return None if report is None else report.get("ok") is True


def _analysis(root: Path, command: str, url: str) -> dict[str, Any] | None:
    """The JSON object printed by a command of analyze_activations.py, or None."""
    call = [sys.executable, str(root / "analyze_activations.py"), command, url, "--json"]
    done = subprocess.run(call, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        last_line = done.stderr.strip().rpartition("\n")[2]
        logging.warning("analyze_activations.py %s %s gave no answer: %s", command, url, last_line)
        return None
    return answer if isinstance(answer, dict) else None
