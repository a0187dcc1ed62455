"""Forward passes that take no time: outputs that the device computed once are replayed.

So a run shows how fast everything after the device is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.common.engine import Engine
from core.reduce.reduced_step import ReducedOutput
from core.run.extraction import WindowBuffer
from core.run.job import Job
from core.samples.window_parts import PartOfWindow
from core.shards.encoding import WindowActivations
from core.step.fetching import plan_fetch
from core.step.layout import StepArrays, step_arrays


@dataclass(frozen=True)
class ReplayedOutput:
    """A `core.step.backend.StepOutput` that is on the host already: whole rows, nothing gathered."""

    computed: dict[str, np.ndarray]
    magnitudes: dict[str, np.ndarray]

    def wait(self) -> None:
        """Returns at once."""

    def peaks(self) -> dict[str, np.ndarray]:
        """As computed."""
        return self.magnitudes

    def norms(self) -> dict[str, np.ndarray]:
        """None were asked for."""
        return {}

    def start_copy(self, kept: np.ndarray | None) -> None:
        """Nothing is copied."""
        assert kept is None

    def fetch(self) -> dict[str, np.ndarray]:
        """As computed."""
        return self.computed


@dataclass(frozen=True)
class ReplayedStep:
    """A `core.step.backend.Step` that returns stored outputs."""

    outputs: dict[bytes, ReplayedOutput]

    def __call__(self, arrays: StepArrays) -> ReplayedOutput:
        """The device's output for these tokens."""
        return self.outputs[arrays.tokens.tobytes()]


def computed_once(engine: Engine) -> ReplayedStep:
    """Runs every step of the engine's job."""
    outputs = {}
    for arrays in engine.all_steps():
        if arrays.tokens.tobytes() in outputs:
            continue
        output = engine.model.step(arrays)
        assert not isinstance(output, ReducedOutput), "the engine of the benchmarks stores tokens whole"
        output.start_copy(None)
        outputs[arrays.tokens.tobytes()] = ReplayedOutput(output.fetch(), output.peaks())
    return ReplayedStep(outputs)


def replayed(engine: Engine) -> Engine:
    """The same job on a device that takes no time."""
    return replace(engine, model=replace(engine.model, step=computed_once(engine)))


def window_activations(job: Job, step: ReplayedStep) -> list[WindowActivations]:
    """The encoder's input for each window of the job."""
    return [_activations(job, step, part) for window in job.windows() for part in job.parts_of(window)]


def _activations(job: Job, step: ReplayedStep, part: PartOfWindow) -> WindowActivations:
    layouts = job.steps_of(part)
    buffer = WindowBuffer.allocate(job, part, len(layouts))
    for one in layouts:
        output = step(step_arrays(one, [sample.token_ids for sample in part.own.samples]))
        buffer.scatter(plan_fetch(one, part.own.samples, part.own.lengths), output.fetch())
    return buffer.finished()


def cast(activations: WindowActivations, dtype: np.dtype) -> WindowActivations:
    """The same activations in another stored dtype, rounded as the device rounds."""
    return replace(activations, by_site={site: array.astype(dtype) for site, array in activations.by_site.items()})


def total_bytes(activations: Sequence[WindowActivations]) -> int:
    """Bytes of all arrays."""
    return sum(array.nbytes for window in activations for array in window.by_site.values())
