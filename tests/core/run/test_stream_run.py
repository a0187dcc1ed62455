"""A stream that is told to stop ends, wherever its stages are, and the next run goes on."""

import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import cache_dir, committed_files, token_lines, write_jsonl, write_model

from core.hosts.pod_slice import SINGLE_HOST
from core.hosts.session import HostSession
from core.run import extraction
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.stores import open_storage
from core.run.stream_run import LoadedStep, load, prepare_stream, run_stream
from core.step.backend import StepOutput
from core.step.layout import StepArrays


class SlowStep:
    """A device that is slower than the reader, and sets `stop` in its n-th step. Several threads may call it."""

    def __init__(self, model: LoadedStep, stop: threading.Event, stop_at: int) -> None:
        self._step, self._stop, self._stop_at = model.step, stop, stop_at
        self._numbers = itertools.count(1)

    def __call__(self, arrays: StepArrays) -> StepOutput:
        number = next(self._numbers)
        time.sleep(0.02)
        if number == self._stop_at:
            self._stop.set()
        return self._step(arrays)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("stream")
    return RunConfig(
        model_path=str(write_model(folder / "model", tokenizer=False)),
        dataset_path=str(write_jsonl(folder / "s.jsonl", token_lines(60, longest=60))),
        output_dir=str(folder / "calm"),
        checkpoint_dir=str(folder / "checkpoints"),
        compilation_cache_dir=cache_dir(),
        shard_size_gb=50_000 / 2**30,
        max_seq_length=64,
        batch_size=1,
    )


def on_its_own(stop: threading.Event) -> HostSession:
    return HostSession(SINGLE_HOST, "run", stop)


def test_a_stream_stopped_at_any_step_ends_and_the_next_run_goes_on(config, tmp_path):
    job = prepare_job(config, "float32")
    model = load(job)
    assert run_stream(prepare_stream(job, open_storage(job)), model, on_its_own(threading.Event())).status == "complete"
    job = replace(job, config=replace(config, output_dir=str(tmp_path / "out")))
    statuses = []
    while not statuses or statuses[-1] == "stopped":
        stop = threading.Event()
        session = on_its_own(stop)
        slow = LoadedStep(SlowStep(model, stop, stop_at=len(statuses) + 1), 0.0)
        prepared = prepare_stream(job, open_storage(job))
        run = threading.Thread(
            target=lambda p=prepared, m=slow, s=session: statuses.append(run_stream(p, m, s).status),
            daemon=True,
        )
        before = len(statuses)
        run.start()
        run.join(20)
        assert len(statuses) == before + 1, "the stopped run hangs"
    assert len(statuses) > 3
    assert committed_files(tmp_path / "out") == committed_files(Path(config.output_dir))


def test_one_thread_starts_all_programs_of_devices_that_need_them_in_one_order(config, tmp_path, monkeypatch):
    job = prepare_job(replace(config, output_dir=str(tmp_path / "out"), quantize="int8", positions=("4:",)), "float32")
    monkeypatch.setattr(type(job.backend), "lanes", lambda *_: 1)
    model, threads = load(job), {}

    def noting(name, function):
        def call(*args):
            threads.setdefault(name, set()).add(threading.get_ident())
            return function(*args)

        return call

    monkeypatch.setattr(extraction, "gather", noting("gather", extraction.gather))
    model = LoadedStep(noting("step", model.step), 0.0, noting("reduce", model.reduce))
    assert run_stream(prepare_stream(job, open_storage(job)), model, on_its_own(threading.Event())).status == "complete"
    assert threads.keys() == {"step", "gather", "reduce"}
    assert len(set.union(*threads.values())) == 1
