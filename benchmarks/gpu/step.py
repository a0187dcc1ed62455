"""Our side of the GPU benchmark: the engine's step on one device, with random weights made on that device.

Axis letters: L captured layers, B rows, T tokens of a row, D d_model.
"""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from core.jax_utils import COMPUTE_DTYPES, ExtractionStep
from core.step.backend import StepOutput, StepRequest
from core.step.host_copies import begin_copies, on_host, wait_for
from core.step.layout import StepArrays
from qwen2_jax import Capture, Decoder, DecoderConfig
from qwen2_jax.checkpoints.weights import cut_config
from qwen2_jax.parameters import parameter_specs
from qwen2_jax.sharding import ModelMesh

DTYPE = "bfloat16"
_SPREAD = 0.02
SITE = "residual"


@dataclass(frozen=True)
class UniformBatch:
    """Rows filled by samples of equal length.

    Attributes:
      samples: per row.
    """

    rows: int
    length: int
    samples: int

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.rows * self.length

    @property
    def sample_length(self) -> int:
        """Tokens of every sample."""
        return self.length // self.samples

    def arrays(self, vocab_size: int) -> StepArrays:
        """Random tokens, the same each time."""
        shape = self.rows, self.length
        tokens = np.random.default_rng(0).integers(0, vocab_size, shape).astype(np.int32)
        place = np.broadcast_to(np.arange(self.length, dtype=np.int32), shape)
        return StepArrays(tokens, place // self.sample_length + 1, place % self.sample_length)


@dataclass(frozen=True)
class OurSide:
    """A step and its inputs. parameters: by their names in `qwen2_jax.parameters`, of the layers that run."""

    config: DecoderConfig
    parameters: dict[str, Array]
    arrays: StepArrays
    step: ExtractionStep

    @classmethod
    def of(cls, config: DecoderConfig, layers: tuple[int, ...], workload: UniformBatch) -> "OurSide":
        """The residuals of these layers, computed and stored in bfloat16 on this process's first device."""
        request = StepRequest(Capture(layers), DTYPE, DTYPE)
        mesh = ModelMesh.of(config, jax.local_devices()[:1], 1)
        cut = cut_config(config, request.capture.layers_run(config.n_layers))
        parameters = _random_parameters(cut, mesh)
        step = ExtractionStep(Decoder(cut, parameters), request, mesh)
        return cls(cut, parameters, workload.arrays(config.vocab_size), step)

    def forward(self, steps: int) -> None:
        """So many steps, nothing copied; the next is started before one is waited for, as in a run."""
        before: StepOutput | None = None
        for _ in range(steps):
            output = self.step(self.arrays)
            if before is not None:
                wait_for(before.peaks)
            before = output
        assert before is not None
        wait_for(before.peaks)

    def extract(self, steps: int) -> None:
        """The same, and what each gives is brought to the host beside the next."""
        before: StepOutput | None = None
        for _ in range(steps):
            output = begin_copies(self.step(self.arrays))
            if before is not None:
                on_host(before)
            before = output
        assert before is not None
        on_host(before)

    def copy(self) -> tuple[int, float]:
        """The output bytes of a finished step, and the seconds it takes to copy them to the host."""
        output = self.step(self.arrays)
        wait_for(output.peaks)
        started = time.perf_counter()
        n_bytes = sum(array.nbytes for array in on_host(begin_copies(output)).arrays.values())
        return n_bytes, time.perf_counter() - started

    def activations(self) -> Shaped[np.ndarray, "L B T D"]:
        """What a step gives."""
        values: np.ndarray = on_host(begin_copies(self.step(self.arrays))).arrays[SITE]
        return values


def _random_parameters(config: DecoderConfig, mesh: ModelMesh) -> dict[str, Float[Array, "..."]]:
    """Norms are ones, the rest small random values. Made on the device: nothing is copied from the host."""
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
    # The generator of JAX that is fast on GPUs.
    made: dict[str, Array] = jax.jit(make, out_shardings=places)(jax.random.key(0, impl="rbg"))
    return made
