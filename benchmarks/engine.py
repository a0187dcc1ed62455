"""The engine of extract_activations.py with the model loaded once: what is timed is a run, from stream to commit."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from core.activation_storage import CommitRecord
from core.batching import StepArrays, plan_steps, step_arrays
from core.extraction import Extraction
from core.formats import FORMATS
from core.jax_utils import COMPUTE_DTYPES, ExtractionStep, data_mesh
from core.job import Job, open_storage, prepare_job
from core.pipeline import Pipeline
from core.progress import Progress
from core.run_config import RunConfig
from core.shard_encoding import ShardEncoder
from qwen2_jax import load_model


@dataclass(frozen=True)
class RunNumbers:
    """What one run did: counts of what it committed and busy seconds of its stages."""

    samples: int
    tokens: int
    shards: int
    bytes: int
    stages: dict[str, float]


@dataclass(frozen=True)
class Engine:
    """A loaded model and its job. Nothing is compiled until the first run, and nothing is read from a cache on disk."""

    job: Job
    step: ExtractionStep

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
    ) -> "Engine":
        """The job of the flags with these names; float32 compute."""
        config = RunConfig(
            model_path=model_path,
            dataset_path=str(stream),
            predictions_per_task=1,
            layers_to_extract=tuple(layers),
            dtype=dtype,
            compute_dtype="float32",
            batch_size=batch_size,
            shard_size_gb=shard_mb / 1024,
            enable_checkpointing=False,
        )
        job = prepare_job(config, config.compute_dtype)
        mesh = data_mesh()
        model = load_model(
            model_path,
            dtype=COMPUTE_DTYPES[config.compute_dtype],
            mesh=mesh,
            n_layers=job.capture.layers[-1] + 1,
            with_head=False,
        )
        return cls(job, ExtractionStep(model, job.capture, dtype, mesh))

    def run(self, output_dir: Path) -> RunNumbers:
        """Reads, tokenises, packs, computes, copies, encodes and commits the whole stream into a new folder."""
        job = replace(self.job, config=replace(self.job.config, output_dir=str(output_dir)))
        config, pipeline = job.config, Pipeline()
        storage = open_storage(job)
        storage.open()
        progress = Progress(
            pipeline,
            expected_samples=0,
            committed_samples=0,
            log=lambda line: None,
            metrics_path=config.metrics_path,
        )
        with progress, ThreadPoolExecutor(os.cpu_count(), "compress") as compressors:
            encoder = ShardEncoder(FORMATS[config.format], config.gzipped, storage.spool, config.folder, compressors)
            Extraction(
                job=job,
                storage=storage,
                step=self.step,
                shape=job.batch_shape(jax.local_device_count()),
                encoder=encoder,
                progress=progress,
                pipeline=pipeline,
                stop=threading.Event(),
                on_commit=_ignore,
            ).run(job.windows())
            storage.write_index()
        return RunNumbers(progress.samples, progress.tokens, progress.shards, progress.bytes, progress.stage_seconds())

    def planned_steps(self) -> list[StepArrays]:
        """The device inputs of every step of a run, in its order."""
        shape = self.job.batch_shape(jax.local_device_count())
        return [
            step_arrays(step, [sample.token_ids for sample in window.samples])
            for window in self.job.windows()
            for step in plan_steps(window.lengths, shape)
        ]

    def run_steps(self, steps: Sequence[StepArrays]) -> None:
        """The forward passes alone: each waited for, nothing kept."""
        for arrays in steps:
            output = self.step(arrays)
            jax.block_until_ready((output.activations, output.peaks))


def _ignore(record: CommitRecord) -> None:
    """Nothing is kept beside the records."""
