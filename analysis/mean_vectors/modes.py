"""The two vectors of a text: which pools of its tokens they are made of.

Axis letters: S samples, L layers, P pools, D d_model, W width of a vector.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from core.base.errors import UsageError
from core.step.model_shape import ModelShape

POOLS = {"short": ("exp:0.067",), "long": ("last", "exp:0.023", "exp:0.067", "exp:0.159")}
"""The pools of a mode, as the flag `--pool` names them, in the order in which they are joined."""
MODES = (*POOLS, "both")

_PYTHIA_12B = ("gpt_neox", 36, 5120)
_PYTHIA_12B_LAYERS = (25, 26, 27)


def modes_of(choice: str) -> tuple[str, ...]:
    """The modes that a choice of `MODES` stands for. Raises UsageError for another one."""
    if choice not in MODES:
        raise UsageError(f"--mode {choice}: must be one of {', '.join(MODES)}")
    return tuple(POOLS) if choice == "both" else (choice,)


def pools_of(modes: Sequence[str]) -> tuple[str, ...]:
    """The distinct pools of some modes: those of both are those of "long"."""
    return tuple(dict.fromkeys(pool for mode in reversed(modes) for pool in POOLS[mode]))


def layers_of(given: Sequence[int] | None, shape: ModelShape, model_path: str) -> tuple[int, ...]:
    """The layers of a run, ascending: those that were given, or 25 to 27 of a model with Pythia-12B's shape.

    Raises UsageError for layers that the model does not have, and where none were given for another model.
    """
    if given is None and (shape.family, shape.n_layers, shape.d_model) == _PYTHIA_12B:
        return _PYTHIA_12B_LAYERS
    if not given:
        default = "only a model with the shape of Pythia-12B has a default (25 26 27)"
        raise UsageError(f"--layers: name the layers of {model_path}, from 0 to {shape.n_layers - 1}: {default}")
    absent = [layer for layer in given if not 0 <= layer < shape.n_layers]
    if absent:
        raise UsageError(f"--layers {absent[0]}: {model_path} has layers 0 to {shape.n_layers - 1}")
    return tuple(sorted(set(given)))


def vectors_of(pooled: Float32[np.ndarray, "S L P D"], pools: Sequence[str], mode: str) -> Float32[np.ndarray, "S W"]:
    """The vectors of a mode: the mean over the layers, in float64, of its pools joined; W is their number times D."""
    wanted = [pools.index(pool) for pool in POOLS[mode]]
    mean = pooled[:, :, wanted].mean(axis=1, dtype=np.float64)
    return mean.reshape(len(pooled), -1).astype(np.float32)
