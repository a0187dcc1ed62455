"""What editors, notebooks and `help` list: every argument of the functions that a notebook calls, with its default."""

import dataclasses
import inspect

import pytest

import create_dataset_streams
import extract_activations
import prepare
from core.in_memory.options import CaptureOptions
from core.run.config import RunConfig
from core.streams.options import StreamOptions
from parquet_cache.options import PrepareOptions

FUNCTIONS = [
    (extract_activations.extract, RunConfig, {"plan", "tpu_topology", "json", "log_file", "verbose"}),
    (extract_activations.price, RunConfig, {"plan", "json", "log_file", "verbose"}),
    (extract_activations.run_config, RunConfig, set()),
    (extract_activations.capture, CaptureOptions, set()),
    (create_dataset_streams.create_streams, StreamOptions, {"num_shards", "chunk_size_mb"}),
    (create_dataset_streams.create_sharded_dataset, StreamOptions, {"num_streams"}),
    (prepare.prepare, PrepareOptions, set()),
]


@pytest.mark.parametrize(("function", "options", "refused"), FUNCTIONS)
def test_every_option_is_listed_but_those_that_are_refused(function, options, refused):
    shown = inspect.signature(function).parameters
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    assert fields.keys() - shown.keys() == refused
    assert shown.keys() - fields.keys() <= {"quiet", "model", "samples", "progress"}
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in shown.values())


def test_an_option_has_the_default_and_the_type_of_its_field():
    shown = inspect.signature(extract_activations.extract).parameters
    assert (shown["batch_size"].default, shown["batch_size"].annotation) == (RunConfig.batch_size, int)
    assert (shown["project"].default, shown["project"].annotation) == (None, str | None)
    assert shown["activation_type"].default == "residual"  # what the function itself says
