"""The shape checks of the tests are on: a wrong array is an error, and a function without arrays is left alone."""

import inspect

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from analysis.certificate.certification import as_stored
from core.base.canonical_json import canonical_json
from core.jax_utils import _peaks
from core.step.layout import StepArrays


def test_a_wrong_dtype_or_shape_is_an_error():
    with pytest.raises(TypeCheckError):
        as_stored(np.zeros(3, np.int32), "float32")
    with pytest.raises(TypeCheckError):
        _peaks(jnp.zeros((2, 3)), ())


def test_so_is_a_wrong_field_of_a_dataclass():
    rows = np.zeros((2, 3), np.int32)
    StepArrays(rows, rows, rows)
    with pytest.raises(TypeCheckError):
        StepArrays(rows, rows, np.zeros((2, 4), np.int32))


def test_a_function_without_arrays_is_not_wrapped():
    assert not hasattr(canonical_json, "__wrapped__")
    assert inspect.isfunction(canonical_json)
