"""Activations in memory: what a run computes, with nothing written."""

import itertools
import operator
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32, Shaped
from tqdm import tqdm

from core.backends import choose_backend
from core.base.arguments import path_text
from core.base.dtypes import DTYPES
from core.base.errors import RunError, UsageError
from core.jax_utils import LoadedBackend, enable_compilation_cache
from core.reduce.reductions import Reduction
from core.run.config import RunConfig
from core.samples.windows import TokenizedSample, Window
from core.shards.window_activations import WindowActivations
from core.step.backend import Backend, Step, StepOutput, StepRequest, batch_shape
from core.step.capture import resolve_capture
from core.step.fetching import Fetch, fetch_of
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host
from core.step.layout import BatchShape, StepArrays, lay_out_steps, step_arrays
from core.step.model_shape import ModelShape
from core.step.peaks import Peaks, first_unfit_row, largest_of
from qwen2_jax import Capture, Decoder, load_tokenizer

# Of each sample (T, D).
Activations = dict[str, dict[int, list[Shaped[np.ndarray, "_ _"]]]]
Sample = str | Sequence[int] | np.ndarray


def capture(
    model: str | Decoder,
    samples: Sample | Sequence[Sample],
    *,
    layers: int | Sequence[int] | None = None,
    sites: str | Sequence[str] = "residual",
    dtype: str = "float32",
    tokenizer: Any = None,
    revision: str | None = None,
    backend: str = "auto",
    compute_dtype: str = "auto",
    mesh: str = "auto",
    trust_remote_code: bool = False,
    max_seq_length: int | None = None,
    batch_size: int = RunConfig.batch_size,
    pack: bool = True,
    progress: bool = False,
) -> Activations:
    """The activations of texts or token ids: site -> layer -> one (T, D) array a sample, in the order of `samples`.

    T is the number of tokens of the sample, D the width of the site. Samples are packed into rows and split over the
    devices of this process as in a run. The whole result is held in this host's memory.

    Args:
      model: a Hugging Face folder, hub id or .gguf file, of which only the needed layers are loaded; or a model from
        `qwen2_jax.load_model`, which runs in its own dtype on its own devices.
      samples: one or several texts or lists of token ids. Texts are tokenized with the tokenizer's defaults.
      layers: block numbers from 0; None: all. The sites that exist once, `embedding` and `final_norm`, have the
        layer numbers -1 and n_layers.
      sites: names of `qwen2_jax.SITES`, or names of TransformerLens or Hugging Face.
      dtype: of the arrays, "float32", "float16" or "bfloat16".
      tokenizer: a transformers tokenizer; None: that of `model`, which must then be a path.
      max_seq_length: the length that rows are laid out for; None: that of the longest sample. With the
        `max_seq_length` of a run the values are bit-identical to those of the run.
      revision, backend, compute_dtype, mesh, trust_remote_code, batch_size, pack: as the flags of
        extract_activations.py.
      progress: shows a bar on stderr.

    Raises UsageError for invalid arguments, ModelError for the model, RunError for values that are not finite or do
    not fit `dtype`.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    engine: Backend
    if isinstance(model, Decoder):
        if (revision, trust_remote_code, backend, mesh) != (None, False, "auto", "auto"):
            raise UsageError(
                "revision, trust_remote_code, backend, mesh: `load_model` has decided these of a loaded model"
            )
        engine, name = LoadedBackend(model), f"this {model.config.family} model"
    else:
        name = path_text(model, "model")
        engine = choose_backend(backend, name, revision, mesh=mesh, trust_remote_code=trust_remote_code)
        model = name
    if engine.name == "jax" and jax.config.values["jax_compilation_cache_dir"] is None:
        enable_compilation_cache(RunConfig.compilation_cache_dir)
    shape = engine.model_shape(name, revision)
    tokenized = _tokenized(_as_many(samples), model, tokenizer, revision)
    _check_tokens(tokenized, shape, name)
    captured = _resolved(sites, layers, shape, name)
    request = StepRequest(captured, dtype, engine.compute_dtype(compute_dtype))
    step = engine.load(name, revision, request)
    longest = max([max_seq_length or 1, *map(len, tokenized)])
    rows = batch_shape(engine, shape, request, batch_size=batch_size, pack=pack, longest=longest)
    return _run(tokenized, step, request, shape, rows, engine.lanes(shape, request), show_bar=progress)


def _as_many(samples: Sample | Sequence[Sample]) -> list[Any]:
    """A list of samples; one text, or one list of token ids, becomes a list of one."""
    if not hasattr(samples, "__len__"):
        raise UsageError("samples: a text, a list of token ids, or a list of such")
    if isinstance(samples, str):
        return [samples]
    is_one = len(samples) > 0 and not isinstance(samples[0], str) and np.ndim(samples[0]) == 0
    return [samples] if is_one else list(samples)


def _resolved(sites: str | Sequence[str], layers: int | Sequence[int] | None, shape: ModelShape, name: str) -> Capture:
    try:
        return resolve_capture(_as_list(sites), None if layers is None else _as_list(layers), shape, name)
    except UsageError as error:
        # The messages name flags of the command; here they are arguments.
        text = str(error).replace("--layers_to_extract", "layers").replace("--activation_type", "sites")
        raise UsageError(text) from error


def _as_list(values: Any) -> list[Any]:
    """A list of texts or of Python ints."""
    many = [values] if isinstance(values, str) or np.ndim(values) == 0 else list(values)
    return [value if isinstance(value, str) else operator.index(value) for value in many]


def _tokenized(
    samples: Sequence[Sample], model: str | Decoder, tokenizer: Any, revision: str | None
) -> list[Int32[np.ndarray, "_"]]:
    texts = [sample for sample in samples if isinstance(sample, str)]
    encoded = iter(_encoded(texts, model, tokenizer, revision) if texts else ())
    ids = [next(encoded) if isinstance(sample, str) else sample for sample in samples]
    for place, one in enumerate(ids):
        if not len(one):
            raise UsageError(f"samples[{place}]: it has no tokens")
        if not np.issubdtype(np.asarray(one).dtype, np.integer):
            raise UsageError(f"samples[{place}]: neither a text nor a list of token ids")
    return [np.asarray(one, np.int32) for one in ids]


def _encoded(texts: list[str], model: str | Decoder, tokenizer: Any, revision: str | None) -> list[list[int]]:
    if tokenizer is None:
        if isinstance(model, Decoder):
            raise UsageError("tokenizer: a loaded model takes token ids; for texts give its tokenizer too")
        tokenizer = load_tokenizer(model, revision)
    encoded: list[list[int]] = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return encoded


def _check_tokens(tokenized: Sequence[Int32[np.ndarray, "_"]], shape: ModelShape, name: str) -> None:
    for place, ids in enumerate(tokenized):
        if not 0 <= int(ids.min()) <= int(ids.max()) < shape.vocab_size:
            raise UsageError(f"samples[{place}]: its token ids are not all in 0..{shape.vocab_size - 1}")
        if len(ids) > shape.max_positions:
            raise UsageError(f"samples[{place}]: {len(ids)} tokens, and {name} knows {shape.max_positions} positions")


def _run(
    tokenized: Sequence[Int32[np.ndarray, "_"]],
    step: Step,
    request: StepRequest,
    shape: ModelShape,
    rows: BatchShape,
    lanes: int,
    *,
    show_bar: bool,
) -> Activations:
    """Runs the samples as one window whose activations stay in memory."""
    samples = tuple(TokenizedSample(i, i, 1, ids, len(ids), "") for i, ids in enumerate(tokenized))
    window = Window(1, samples, (), None)
    layers = {site: request.capture.layers_of(site, shape.n_layers) for site in request.capture.sites}
    stored = {site: Reduction().arrays(shape.site_widths[site], DTYPES[request.stored_dtype]) for site in layers}
    layouts = lay_out_steps(window.lengths, rows)
    activations = WindowActivations.allocate(window, layers, stored, len(layouts))
    with ThreadPoolExecutor(lanes, "device") as device, tqdm(total=len(samples), disable=not show_bar) as bar:
        under_way: deque[tuple[Fetch, Future[StepOutput]]] = deque()
        for layout in layouts:
            fetch = fetch_of(layout, samples, window.lengths)
            under_way.append((fetch, device.submit(_compute, step, step_arrays(layout, tokenized), fetch)))
            # One more than are computed at once: the device computes the next step while the last one is copied.
            if len(under_way) > lanes:
                _store(*under_way.popleft(), activations, bar)
        while under_way:
            _store(*under_way.popleft(), activations, bar)
    return _by_sample(activations)


def _compute(step: Step, arrays: StepArrays, fetch: Fetch) -> StepOutput:
    return begin_copies(gather(step(arrays), fetch.gathered))


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
        sample, token = fetch.sample_at(found.row, found.unit)
        what = f"magnitude {found.peak:.0f} does not fit {dtype.name}"
        if not found.is_finite:
            what = "the model computes NaN or infinity"
        place = f"{found.site} of layer {activations.layers[found.site][found.slot]}, token {token}"
        raise RunError(f"samples[{sample}], {place}: {what}: try another dtype or compute_dtype")


def _by_sample(activations: WindowActivations) -> Activations:
    offsets = activations.window.offsets
    spans = [slice(start, stop) for start, stop in itertools.pairwise(offsets.tolist())]
    return {
        site: {layer: [activations.arrays[site][slot, span] for span in spans] for slot, layer in enumerate(layers)}
        for site, layers in activations.layers.items()
    }
