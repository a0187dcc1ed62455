"""The engine of extract_activations.py with the model loaded once, to time runs from stream to commit."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from core.hosts.pod_slice import SINGLE_HOST
from core.hosts.session import HostSession
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.job import Job
from core.run.progress import Summary
from core.run.stores import open_storage
from core.run.stream_run import LoadedStep, load, prepare_stream, run_stream
from core.step.backend import StepOutput
from core.step.host_copies import wait_for
from core.step.layout import StepArrays, lay_out_steps, step_arrays


@dataclass(frozen=True)
class Engine:
    """A loaded model and its job. Nothing is compiled until the first run, and nothing is read from a cache on disk."""

    job: Job
    model: LoadedStep

    @classmethod
    def load(
        cls,
        model_path: str,
        stream: Path,
        *,
        layers: Sequence[int],
        dtype: str,
        batch_size: int,
        shard_mb: float,
        shard_format: str = "pickle",
        compute_dtype: str = "float32",
    ) -> "Engine":
        """The job of the flags with these names (`shard_format` is --format)."""
        config = RunConfig(
            model_path=model_path,
            dataset_path=str(stream),
            predictions_per_task=1,
            layers_to_extract=tuple(layers),
            dtype=dtype,
            compute_dtype=compute_dtype,
            batch_size=batch_size,
            shard_size_gb=shard_mb / 1024,
            format=shard_format,
            enable_checkpointing=False,
        )
        job = prepare_job(config, config.compute_dtype)
        return cls(job, load(job))

    def run(self, output_dir: Path | str) -> Summary:
        """Surveys, reads, tokenises, packs, computes, copies, encodes and commits the whole stream to a new folder.

        `output_dir` may be a gs:// URL.
        """
        job = replace(self.job, config=replace(self.job.config, output_dir=str(output_dir)))
        prepared = prepare_stream(job, open_storage(job))
        return run_stream(
            prepared, self.model, HostSession(SINGLE_HOST, "run", threading.Event()), log=lambda line: None
        )

    def all_steps(self) -> list[StepArrays]:
        """The device inputs of every step of a run, in its order."""
        return [
            step_arrays(layout, [sample.token_ids for sample in window.samples])
            for window in self.job.windows()
            for layout in lay_out_steps(window.lengths, self.job.batch_shape)
        ]

    def run_steps(self, steps: Sequence[StepArrays]) -> None:
        """The forward passes alone, nothing kept. As in a run, one is started before the last is waited for."""
        last: Future[StepOutput] | None = None
        with ThreadPoolExecutor(self.job.backend.lanes(self.job.model, self.job.step_request)) as device:
            for arrays in steps:
                started = device.submit(self.model.step, arrays)
                if last is not None:
                    wait_for(last.result().peaks)
                last = started
            if last is not None:
                wait_for(last.result().peaks)
