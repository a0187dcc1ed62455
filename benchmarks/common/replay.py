"""Forward passes that take no time: outputs that the device computed once are replayed.

So a run shows how fast everything after the device is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.common.engine import Engine
from core.run.job import Job
from core.samples.window_parts import PartOfWindow
from core.shards.window_activations import WindowActivations
from core.step.backend import StepOutput
from core.step.fetching import fetch_of
from core.step.host_copies import begin_copies, on_host
from core.step.layout import StepArrays, step_arrays


@dataclass(frozen=True)
class ReplayedStep:
    """A `core.step.backend.Step` that has seen every batch before.

    outputs: by token ids, of whole rows, on the host.
    """

    outputs: dict[bytes, StepOutput]

    def __call__(self, arrays: StepArrays) -> StepOutput:
        """What the device gave for these tokens."""
        return self.outputs[arrays.tokens.tobytes()]


def computed_once(engine: Engine) -> ReplayedStep:
    """Runs every step of the engine's job."""
    assert engine.model.reduce is None, "the engine of the benchmarks stores tokens whole"
    outputs: dict[bytes, StepOutput] = {}
    for arrays in engine.all_steps():
        if arrays.tokens.tobytes() not in outputs:
            outputs[arrays.tokens.tobytes()] = on_host(begin_copies(engine.model.step(arrays)))
    return ReplayedStep(outputs)


def replayed(engine: Engine) -> Engine:
    """The same job on a device that takes no time."""
    return replace(engine, model=replace(engine.model, step=computed_once(engine)))


def window_activations(job: Job, step: ReplayedStep) -> list[WindowActivations]:
    """The encoder's input for each window of the job."""
    return [_activations(job, step, part) for window in job.windows() for part in job.parts_of(window)]


def _activations(job: Job, step: ReplayedStep, part: PartOfWindow) -> WindowActivations:
    layouts = job.layouts_of(part)
    activations = WindowActivations.allocate(part.own, job.layers, job.stored, len(layouts))
    for layout in layouts:
        output = step(step_arrays(layout, [sample.token_ids for sample in part.own.samples]))
        activations.scatter(fetch_of(layout, part.own.samples, part.own.lengths), output.arrays)
    return activations


def cast(activations: WindowActivations, dtype: np.dtype) -> WindowActivations:
    """The same in another stored dtype, rounded as the device rounds."""
    return replace(activations, arrays={name: array.astype(dtype) for name, array in activations.arrays.items()})


def total_bytes(activations: Sequence[WindowActivations]) -> int:
    """Of all arrays."""
    return sum(array.nbytes for window in activations for array in window.arrays.values())
