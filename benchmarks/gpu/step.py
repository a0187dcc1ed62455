"""Our side of the GPU's benchmark: the engine's step on one device, with random weights that are made there.

Axis letters: L captured layers, B rows, T tokens of a row, D d_model.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from core.jax_utils import COMPUTE_DTYPES, ExtractionStep, JaxStepOutput
from core.step.backend import StepRequest
from core.step.layout import StepArrays
from qwen2_jax import Capture, Decoder, DecoderConfig
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.parameters import parameter_specs
from qwen2_jax.sharding import ModelMesh

DTYPE = "bfloat16"
_SPREAD = 0.02
SITE = "residual"


@dataclass(frozen=True)
class Workload:
    """Rows that samples of one length fill.

    Attributes:
      samples: of each row.
    """

    rows: int
    length: int
    samples: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.length

    @property
    def sample_length(self) -> int:
        """Of every sample."""
        return self.length // self.samples

    def arrays(self, vocab_size: int) -> StepArrays:
        """Random tokens, the same each time."""
        shape = self.rows, self.length
        tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
        place = np.broadcast_to(np.arange(self.length, dtype=np.int32), shape)
        return StepArrays(tokens, place // self.sample_length + 1, place % self.sample_length)


@dataclass(frozen=True)
class OurSide:
    """A step and what it works on. parameters: as `qwen2_jax.parameters` names them, of the layers that run."""

    config: DecoderConfig
    parameters: dict[str, Array]
    arrays: StepArrays
    step: ExtractionStep

    @classmethod
    def of(cls, config: DecoderConfig, layers: tuple[int, ...], workload: Workload) -> "OurSide":
        """The residuals of these layers, computed and stored in bfloat16 on this process's first device."""
        request = StepRequest(Capture(layers), DTYPE, DTYPE)
        mesh = ModelMesh.of(config, jax.local_devices()[:1], 1)
        cut = cut_config(config, request.capture.layers_run(config.n_layers))
        parameters = _random_parameters(cut, mesh)
        step = ExtractionStep(Decoder(cut, parameters), request, mesh)
        return cls(cut, parameters, workload.arrays(config.vocab_size), step)

    def forward(self, steps: int) -> None:
        """So many steps, nothing copied; the next is started before one is waited for, as in a run."""
        before: JaxStepOutput | None = None
        for _ in range(steps):
            output = self.step(self.arrays)
            if before is not None:
                before.wait()
            before = output
        assert before is not None
        before.wait()

    def extract(self, steps: int) -> None:
        """The same, and what each gives is brought to the host beside the next."""
        before: JaxStepOutput | None = None
        for _ in range(steps):
            output = self.step(self.arrays)
            output.start_copy(None)
            if before is not None:
                before.fetch()
            before = output
        assert before is not None
        before.fetch()

    def copy(self) -> tuple[int, float]:
        """The bytes of a step that is done, and the seconds in which they reach the host."""
        output = self.step(self.arrays)
        output.wait()
        started = time.perf_counter()
        output.start_copy(None)
        n_bytes = sum(array.nbytes for array in output.fetch().values())
        return n_bytes, time.perf_counter() - started

    def activations(self) -> Shaped[np.ndarray, "L B T D"]:
        """What a step gives."""
        output = self.step(self.arrays)
        output.start_copy(None)
        return output.fetch()[SITE]


def _random_parameters(config: DecoderConfig, mesh: ModelMesh) -> dict[str, Float[Array, "..."]]:
    """Norms of ones, the rest small. Made by the device: nothing crosses the link to the host."""
    specs = parameter_specs(config, with_final_norm=False, with_head=False)
    dtype = COMPUTE_DTYPES[DTYPE]

    def make(key: Array) -> dict[str, Array]:
        keys = dict(zip(specs, jax.random.split(key, len(specs)), strict=True))
        return {
            name: jnp.ones(spec.shape, dtype)
            if name.endswith("norm.weight")
            else jax.random.normal(keys[name], spec.shape, dtype) * _SPREAD
            for name, spec in specs.items()
        }

    places = {name: mesh.sharding(spec.axes) for name, spec in specs.items()}
    # Of the generators of JAX, the one that GPUs are fast at.
    made: dict[str, Array] = jax.jit(make, out_shardings=places)(jax.random.key(0, impl="rbg"))
    return made
