"""A model of a few numpy lines as a `core.step.backend.Backend`: engine, storage and claims run at no cost.

What it computes depends on the token, its place in its sample and the layer, so every mix-up shows in the bytes.
"""

import hashlib
import itertools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from core.base.dtypes import DTYPES
from core.step.backend import StepOutput, StepRequest
from core.step.layout import StepArrays

N_LAYERS, VOCAB = 2, 320


@dataclass(frozen=True)
class LightShape:
    """Satisfies `core.step.model_shape.ModelShape`."""

    d_model: int
    family: str = "light"
    n_layers: int = N_LAYERS
    vocab_size: int = VOCAB
    max_positions: int = 1 << 20

    @property
    def site_widths(self) -> Mapping[str, int]:
        return {"mlp": self.d_model, "residual": self.d_model}


@dataclass(frozen=True)
class LightBackend:
    """Satisfies `core.step.backend.Backend`.

    Attributes:
      step_s: how long a step takes.
      rounding: added to every activation, as other hardware would; small against what float16 tells apart.
      weights: another number is another model.
      width: values a token.
      stuck_after: so many steps, then one that does not end within minutes and hears no signal, as in a compiler.
    """

    step_s: float = 0.0
    rounding: float = 0.0
    weights: int = 0
    width: int = 8
    stuck_after: int | None = None
    name: str = "light"
    can_pack: bool = True
    has_long_rows: bool = False
    reduces_on_device: bool = False

    def lanes(self, model, request):
        return 1

    def row_multiple(self, model, request):
        return 1

    def model_shape(self, path, revision):
        return LightShape(self.width)

    def model_digest(self, path, revision):
        return f"light {self.weights} {self.width}"

    def compute_dtype(self, name):
        return "float32"

    def load(self, path, revision, request):
        return LightStep(self, request, itertools.count())


@dataclass(frozen=True)
class LightStep:
    """Satisfies `core.step.backend.Step`."""

    backend: LightBackend
    request: StepRequest
    steps: Iterator[int]

    def __call__(self, arrays: StepArrays):
        if next(self.steps) == self.backend.stuck_after:
            hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)
        time.sleep(self.backend.step_s)
        rng = np.random.default_rng(self.backend.weights)
        computed = {}
        for site in self.request.capture.sites:
            table = rng.normal(size=(VOCAB, self.backend.width)).astype(np.float32)
            values = table[arrays.tokens] + np.cos(arrays.positions[..., None] / 7).astype(np.float32)
            layers = np.array(self.request.capture.layers, np.float32)[:, None, None, None] + 1
            computed[site] = values * layers + np.float32(self.backend.rounding)
        return StepOutput(
            arrays={site: values.astype(DTYPES[self.request.stored_dtype]) for site, values in computed.items()},
            peaks={site: np.abs(values).max(-1) for site, values in computed.items()},
            norms={site: np.sqrt((computed[site] ** 2).sum(-1)) for site in self.request.norm_sites},
        )
