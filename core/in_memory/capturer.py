"""A loaded model, and what is captured of every sample that it is given."""

import itertools
import operator
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, Shaped
from tqdm import tqdm

from core.backends import choose_backend
from core.base.arguments import path_text, with_fields_of
from core.base.dtypes import DTYPES
from core.base.errors import RunError, UsageError
from core.in_memory.given_samples import Sample, as_many, check_token_ids, token_ids_of
from core.in_memory.options import CaptureOptions
from core.jax_utils import LoadedBackend, enable_compilation_cache
from core.reduce.pooling import fetch_rows
from core.reduce.reducer import Reducer
from core.reduce.reductions import Reduction, parse_pool
from core.run.config import RunConfig
from core.samples.windows import TokenizedSample, Window
from core.shards.window_activations import WindowActivations
from core.step.backend import Backend, Step, StepOutput, StepRequest, batch_shape
from core.step.capture import resolve_capture
from core.step.fetching import Fetch
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host
from core.step.layout import StepArrays, lay_out_steps, step_arrays
from core.step.model_shape import ModelShape
from core.step.peaks import Peaks, first_unfit_row, largest_of
from qwen2_jax import Capture, Decoder, load_tokenizer

# Of each sample (T, D); with pools (P, D).
Activations = dict[str, dict[int, list[Shaped[np.ndarray, "_ _"]]]]


@with_fields_of(CaptureOptions)
def load_capturer(model: str | Decoder, **options: Any) -> "Capturer":
    """The model with its weights on the devices, ready for any number of calls.

    Args:
      model: a Hugging Face folder, hub id or .gguf file, of which only the needed layers are loaded; or a model from
        `qwen2_jax.load_model`, which runs in its own dtype on its own devices.
      options: the fields of `CaptureOptions`.

    Raises UsageError for invalid options, ModelError for the model.
    """
    chosen = CaptureOptions(**options)
    if chosen.dtype not in DTYPES:
        raise UsageError(f"dtype {chosen.dtype!r}: must be one of {', '.join(DTYPES)}")
    engine, name = _engine(model, chosen)
    if engine.name == "jax" and jax.config.values["jax_compilation_cache_dir"] is None:
        enable_compilation_cache(RunConfig.compilation_cache_dir)
    shape = engine.model_shape(name, chosen.revision)
    reduction = Reduction(pools=tuple(parse_pool(text) for text in _as_list(chosen.pool)))
    compute_dtype = engine.compute_dtype(chosen.compute_dtype)
    # Rounding to the dtype of the result comes after a reduction.
    stored_dtype = compute_dtype if reduction.pools else chosen.dtype
    request = StepRequest(_resolved(chosen, shape, name), stored_dtype, compute_dtype)
    return Capturer(
        name=name,
        options=chosen,
        engine=engine,
        step=engine.load(name, chosen.revision, request),
        request=request,
        reduction=reduction,
        shape=shape,
        has_tokenizer=not isinstance(model, Decoder),
    )


def _engine(model: str | Decoder, options: CaptureOptions) -> tuple[Backend, str]:
    """The backend, and the model's path or what messages call it."""
    decided = options.revision, options.trust_remote_code, options.backend, options.mesh
    if not isinstance(model, Decoder):
        name, (revision, trusted, backend, mesh) = path_text(model, "model"), decided
        return choose_backend(backend, name, revision, mesh=mesh, trust_remote_code=trusted), name
    if decided != (None, False, "auto", "auto"):
        raise UsageError("revision, trust_remote_code, backend, mesh: `load_model` has decided these of a loaded model")
    return LoadedBackend(model), f"this {model.config.family} model"


def _resolved(options: CaptureOptions, shape: ModelShape, name: str) -> Capture:
    layers = None if options.layers is None else _as_list(options.layers)
    try:
        return resolve_capture(_as_list(options.sites), layers, shape, name)
    except UsageError as error:
        # The messages name flags of the command; here they are arguments.
        text = str(error).replace("--layers_to_extract", "layers").replace("--activation_type", "sites")
        raise UsageError(text) from error


def _as_list(values: Any) -> list[Any]:
    """A list of texts or of Python ints."""
    many = [values] if isinstance(values, str) or np.ndim(values) == 0 else list(values)
    return [value if isinstance(value, str) else operator.index(value) for value in many]


@dataclass(frozen=True)
class Capturer:
    """A loaded model and what is captured of samples; `load_capturer` makes it.

    Attributes:
      name: the model's path, or what messages call a model that was given loaded.
      request: of the step. reduction: the pools of each sample, if any.
      has_tokenizer: whether `name` is a path, which has one.
    """

    name: str
    options: CaptureOptions
    engine: Backend
    step: Step
    request: StepRequest
    reduction: Reduction
    shape: ModelShape
    has_tokenizer: bool

    def __call__(self, samples: Sample | Sequence[Sample], *, progress: bool = False) -> Activations:
        """site -> layer -> one (T, D) array a sample, or (P, D) with P pools, in the order of `samples`.

        progress: shows a bar on stderr. Raises UsageError for what is no sample, RunError for values that are not
        finite or do not fit the dtype.
        """
        return self._run(self.token_ids(samples), show_bar=progress)

    def token_ids(self, samples: Sample | Sequence[Sample]) -> list[Int32[np.ndarray, "_"]]:
        """The token ids of each sample, checked against the model. Raises UsageError."""
        many = as_many(samples)
        needs_tokenizer = any(isinstance(sample, str) for sample in many)
        token_ids = token_ids_of(many, self.tokenizer if needs_tokenizer else None)
        check_token_ids(token_ids, self.shape, self.name)
        return token_ids

    @cached_property
    def tokenizer(self) -> Any:
        """A transformers tokenizer: the one that was given, or the model's. Raises UsageError, ModelError."""
        if self.options.tokenizer is not None:
            return self.options.tokenizer
        if not self.has_tokenizer:
            raise UsageError("tokenizer: a loaded model takes token ids; for texts give its tokenizer too")
        return load_tokenizer(self.name, self.options.revision)

    @cached_property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """By site, the layer numbers of its arrays."""
        capture = self.request.capture
        return {site: capture.layers_of(site, self.shape.n_layers) for site in capture.sites}

    @cached_property
    def _reduce(self) -> Reducer | None:
        return Reducer(self.reduction, DTYPES[self.options.dtype]) if self.reduction.pools else None

    def _run(self, token_ids: Sequence[Int32[np.ndarray, "_"]], *, show_bar: bool) -> Activations:
        """Runs the samples as one window whose activations stay in memory."""
        longest = max([self.options.max_seq_length or 1, *map(len, token_ids)])
        size, pack = self.options.batch_size, self.options.pack
        rows = batch_shape(self.engine, self.shape, self.request, batch_size=size, pack=pack, longest=longest)
        pools = self.reduction.pools
        samples = tuple(
            TokenizedSample(i, i, 1, ids, len(ids), "", n_pools=len(pools)) for i, ids in enumerate(token_ids)
        )
        window = Window(1, samples, (), None)
        layouts = lay_out_steps(window.lengths, rows)
        activations = self._allocate(window, len(layouts))
        lanes = self.engine.lanes(self.shape, self.request)
        with ThreadPoolExecutor(lanes, "device") as device, tqdm(total=len(samples), disable=not show_bar) as bar:
            under_way: deque[tuple[Fetch, Future[StepOutput]]] = deque()
            for layout in layouts:
                fetch = fetch_rows(layout, samples, window.lengths, pools)
                computing = device.submit(self._compute, step_arrays(layout, token_ids), fetch)
                under_way.append((fetch, computing))
                # One more than are computed at once: the device computes the next step while the last one is copied.
                if len(under_way) > lanes:
                    _store(*under_way.popleft(), activations, bar)
            while under_way:
                _store(*under_way.popleft(), activations, bar)
        return _by_sample(activations)

    def _allocate(self, window: Window, n_steps: int) -> WindowActivations:
        widths, dtype = self.shape.site_widths, DTYPES[self.options.dtype]
        stored = {site: self.reduction.arrays(widths[site], dtype) for site in self.layers}
        return WindowActivations.allocate(window, self.layers, stored, n_steps)

    def _compute(self, arrays: StepArrays, fetch: Fetch) -> StepOutput:
        output = gather(self.step(arrays), fetch.gathered)
        return begin_copies(output if self._reduce is None else self._reduce(output, fetch))


def _store(fetch: Fetch, computed: Future[StepOutput], activations: WindowActivations, bar: tqdm) -> None:
    output = on_host(computed.result())
    _check_peaks(output.peaks, fetch, activations)
    activations.scatter(fetch, output.arrays)
    bar.update(len(fetch.samples))


def _check_peaks(peaks: Peaks, fetch: Fetch, activations: WindowActivations) -> None:
    """Raises RunError where a stored value is not finite, or does not fit the dtype of the arrays."""
    dtype = next(iter(activations.arrays.values())).dtype
    found = first_unfit_row(peaks, fetch, largest_of(dtype))
    if found is not None:
        sample, row = fetch.sample_at(found.row, found.unit)
        what = f"magnitude {found.peak:.0f} does not fit {dtype.name}"
        if not found.is_finite:
            what = "the model computes NaN or infinity"
        unit = "pool" if activations.window.samples[sample].n_pools else "token"
        place = f"{found.site} of layer {activations.layers[found.site][found.slot]}, {unit} {row}"
        raise RunError(f"samples[{sample}], {place}: {what}: try another dtype or compute_dtype")


def _by_sample(activations: WindowActivations) -> Activations:
    offsets = activations.window.offsets
    spans = [slice(start, stop) for start, stop in itertools.pairwise(offsets.tolist())]
    return {
        site: {layer: [activations.arrays[site][slot, span] for span in spans] for slot, layer in enumerate(layers)}
        for site, layers in activations.layers.items()
    }
