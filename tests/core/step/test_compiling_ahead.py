"""The first step's program is compiled while the weights are read, and is the one that then runs."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from tiny_run import stream_config, token_lines, write_model

from core import jax_utils
from core.base.errors import ModelError
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.stores import open_storage
from core.run.stream_run import load, prepare_stream
from core.step.host_copies import begin_copies, on_host
from core.step.layout import step_arrays


@pytest.fixture
def config(tmp_path) -> RunConfig:
    return stream_config(
        tmp_path,
        write_model(tmp_path / "model", tokenizer=False),
        token_lines(9),
        activation_type=("mlp", "residual", "final_norm"),
        max_seq_length=256,
    )


class Watched:
    """Notes when the step is traced and when the weights are read, and holds these up until `compiled` is set."""

    def __init__(self, monkeypatch) -> None:
        self.events, self.compiled = [], threading.Event()
        call, load_model, lower = (
            jax_utils.Decoder.forward,
            jax_utils.load_model,
            jax_utils.ExtractionStep.compile_ahead,
        )

        def traced(*args):
            self.events.append("traced")
            return call(*args)

        def loaded(*args, **kwargs):
            self.events.append("reading")
            assert self.compiled.wait(30), "nothing is compiled while the weights are read"
            return load_model(*args, **kwargs)

        def compile_ahead(step, *shape):
            lower(step, *shape)
            step._ahead[shape].add_done_callback(lambda _: self.compiled.set())

        monkeypatch.setattr(jax_utils.Decoder, "forward", traced)
        monkeypatch.setattr(jax_utils, "load_model", loaded)
        monkeypatch.setattr(jax_utils.ExtractionStep, "compile_ahead", compile_ahead)


def values(step, job, window) -> dict[str, np.ndarray]:
    part = next(job.parts_of(window))
    output = step(step_arrays(job.layouts_of(part)[0], [sample.token_ids for sample in part.own.samples]))
    return on_host(begin_copies(output)).arrays


def test_the_program_of_the_first_window_is_compiled_meanwhile_and_traced_once(config, monkeypatch):
    job = prepare_job(config, "float32")
    prepared = prepare_stream(job, open_storage(job))
    first = next(prepared.windows)
    plain = values(job.backend.load(config.model_path, None, job.step_request), job, first)
    watched = Watched(monkeypatch)
    model = load(job, prepared.first_shape)
    assert watched.events == ["traced", "reading"]
    ahead = values(model.step, job, first)
    assert watched.events == ["traced", "reading"], "the step is compiled a second time"
    for site, array in plain.items():
        np.testing.assert_array_equal(ahead[site], array)


def test_steps_of_other_shapes_are_compiled_when_they_come(config, monkeypatch):
    job = prepare_job(replace(config, batch_size=2), "float32")
    first = next(prepare_stream(job, open_storage(job)).windows)
    watched = Watched(monkeypatch)
    request = replace(job.step_request, first_shape=(1, 128))
    step = job.backend.load(config.model_path, None, request)
    values(step, job, first)
    assert watched.events == ["traced", "reading", "traced"]


def test_weights_that_cannot_be_read_are_one_error_all_the_same(config, tmp_path):
    job = prepare_job(config, "float32")
    (tmp_path / "model/model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight"):
        load(job)
