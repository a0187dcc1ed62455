"""Finds where each site of a transformers model is read, and verifies it numerically.

A small random batch runs through the model, with hooks on every module. A module's input or output is taken for a site
only where its values satisfy the definition:

    resid_pre, residual   a block's input is the output of the previous block
    attn, mlp             resid_pre + attn + mlp = residual
    resid_mid             the input of some module after attention is resid_pre + attn (of none in a parallel block)
    attn_proj, mlp_proj   the input of the norm whose output is attn, or mlp
    attn_heads, mlp_act   the input of the linear map whose output is attn_proj, or mlp_proj
    v                     the output of the heads at the first token, which attends only to itself
    q, k                  changing the first token's q changes no value, changing its k does
    embedding             block 0's input is a multiple of it, or both differ equally between rows
    final_norm            the input of the output head

A site that is not found in this way is missing, with the reason.

Axis letters: B rows, T tokens, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.base.errors import ModelError
from qwen2_jax.taps import EMBEDDING_LAYER
from torch_models.block_probe import BlockProbe
from torch_models.call_log import CallLog
from torch_models.hooks import Batch, StopForward, Tap, hooked, run_model, tokens_first
from torch_models.structure import is_within

# Two rows of different lengths, so that the probe has padding; no axis of a small model is likely to have size 7.
_LENGTHS = (7, 4)
_SEED = 0
# A padded row may differ from the row alone by rounding, which grows over the layers; a real error is of order 1.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Taps:
    """Where the sites of a model are read.

    Attributes:
      found: (site, layer) → tap.
      missing: site → why it cannot be captured, in the first layer that lacks it.
      widths: site → values per token.
      rows_alone: whether padding changes a row's values, so that each row must run alone.
    """

    found: Mapping[tuple[str, int], Tap]
    missing: Mapping[str, str]
    widths: Mapping[str, int]
    rows_alone: bool


def probe_batch(vocab_size: int, device: torch.device | str = "cpu") -> Batch:
    """Random tokens in rows of `_LENGTHS`, padded on the right; the rows differ at every position."""
    rng = np.random.default_rng(_SEED)
    rows, longest = len(_LENGTHS), max(_LENGTHS)
    tokens = rng.permuted(np.tile(np.arange(vocab_size), (longest, 1)), axis=1)[:, :rows].T
    mask = np.arange(longest)[None] < np.array(_LENGTHS)[:, None]
    places = np.where(mask, np.arange(longest)[None], 0)
    arrays = (np.ascontiguousarray(array, np.int64) for array in (np.where(mask, tokens, 0), mask, places))
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))


@torch.no_grad()
def find_taps(model: nn.Module, layers_path: str, n_layers: int, *, n_heads: int, vocab_size: int, whole: bool) -> Taps:
    """The taps of the first `n_layers` blocks of `model` (all that were kept).

    n_heads: query heads of a layer. whole: no block was cut off, so the final norm can be found too.
    Raises ModelError when the blocks do not form one residual stream.
    """
    batch = probe_batch(vocab_size, next(model.parameters()).device)
    paths = [f"{layers_path}.{layer}" for layer in range(n_layers)]
    last = paths[-1]
    log = _run_probe(model, batch, None if whole else last)
    blocks = [BlockProbe(model, log, path, batch, n_heads) for path in paths]
    _check_stream(model, blocks)
    claims: dict[tuple[str, int], Tap | str] = {
        (site, layer): tap for layer, block in enumerate(blocks) for site, tap in block.taps().items()
    }
    claims["embedding", EMBEDDING_LAYER] = _embedding(model, log, paths[0], batch)
    claims["final_norm", n_layers] = _final_norm(model, log, layers_path) if whole else "blocks were cut off"
    found = {key: tap for key, tap in claims.items() if isinstance(tap, Tap)}
    missing = {site: f"layer {layer}: {why}" for (site, layer), why in reversed(claims.items()) if isinstance(why, str)}
    widths, refused = _widths(log, found)
    if ("q", 0) in found and (fault := _query_fault(model, batch, found, last, blocks[-1].residual)):
        refused |= {"q": fault, "k": fault}
    found = {key: tap for key, tap in found.items() if key[0] not in refused}
    return Taps(found, missing | refused, widths, not _padding_is_harmless(model, batch, last, blocks[-1].residual))


def _widths(log: CallLog, found: Mapping[tuple[str, int], Tap]) -> tuple[dict[str, int], dict[str, str]]:
    """Site → width, and the reason against sites whose width differs between layers."""
    widths: dict[str, int] = {}
    uneven = {}
    for (site, layer), tap in found.items():
        width = _width(log, tap)
        if width != widths.setdefault(site, width):
            uneven[site] = f"layer {layer}: its width is {width} there, {widths[site]} elsewhere"
    return widths, uneven


def _width(log: CallLog, tap: Tap) -> int:
    call = log.calls[tap.module]
    values = call.input if tap.of_input else call.output
    assert values is not None
    return tap.read(values).shape[-1]


def _run_probe(model: nn.Module, batch: Batch, last: str | None) -> CallLog:
    """Runs the probe batch with hooks on every module, to the end or to the module `last`."""
    log = CallLog(batch.shape)
    names = [name for name, _ in model.named_modules()]
    on_output = {name: log.ended(name) for name in names}
    if last is not None:
        end = on_output[last]

        def stop(values: Any) -> None:
            end(values)
            raise StopForward

        on_output[last] = stop
    with hooked(model, on_input={name: log.began(name) for name in names}, on_output=on_output):
        run_model(model, batch)
    return log


def _check_stream(model: nn.Module, blocks: Sequence[BlockProbe]) -> None:
    """Raises ModelError unless each block ran once, and its input is the previous block's output."""
    kind = type(model).__name__
    for layer, block in enumerate(blocks):
        if block.call is None or block.call.input is None or block.call.output is None:
            raise ModelError(
                f"{kind}: block {layer} does not have one input and one output vector per token: it cannot be captured"
            )
        if layer and not torch.equal(block.resid_pre, blocks[layer - 1].residual):
            raise ModelError(
                f"{kind}: the input of block {layer} is not the output of block {layer - 1}: it cannot be captured"
            )


def _embedding(model: nn.Module, log: CallLog, block: str, batch: Batch) -> Tap | str:
    """Block 0's input when it is a multiple of the token embedding; the embedding itself where positions are added."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    call, first = log.once(name or ""), log.once(block)
    assert first is not None
    assert first.input is not None
    if name is None or call is None or call.output is None or call.output.shape != first.input.shape:
        return "the token embedding is not as wide as the residual stream"
    is_token = batch.attention_mask.bool()
    embedded, block_input = call.output[is_token].double(), first.input[is_token].double()
    eps = 4 * torch.finfo(first.input.dtype).eps
    multiple = (embedded * block_input).sum() / (embedded * embedded).sum()
    if bool((block_input - multiple * embedded).norm() <= eps * block_input.norm()):
        return Tap(block, of_input=True)
    both = min(_LENGTHS)
    source, target = (values[:, :both].double() for values in (call.output, first.input))
    off = (source[0] - source[1]) - (target[0] - target[1])
    scale = source.abs().sum(0) + target.abs().sum(0)
    if bool((off.abs() <= eps * scale).all()):
        return Tap(name)
    return "more than a scale and positions lies between the token embedding and block 0"


def _final_norm(model: nn.Module, log: CallLog, layers_path: str) -> Tap | str:
    """The first module outside of the blocks whose output is the output head's input."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is head), None)
    call = log.once(name) if name is not None else None
    if call is None or call.input is None:
        return "the model has no output head"
    before = sorted(
        (other.ended, path)
        for path in log.calls
        if not is_within(path, layers_path) and (other := log.once(path)) is not None and other.ended < call.began
    )
    for _, path in before:
        output = log.calls[path].output
        # Some models cast the input of the head.
        if output is not None and torch.equal(output.to(call.input.dtype), call.input):
            return Tap(path)
    return "no module's output is the input of the output head"


def _query_fault(
    model: nn.Module, batch: Batch, taps: Mapping[tuple[str, int], Tap], last: str, residual: Tensor
) -> str | None:
    """Why q and k are wrong, or None: the first token attends only to itself whatever its q; others attend to its k."""
    moved = {}
    for site in "qk":
        edits = {tap.module: _shift_first_token(tap, batch.shape) for (s, _), tap in taps.items() if s == site}
        moved[site] = _run_to(model, batch, last, edits)
    is_token = batch.attention_mask.bool()
    if not torch.equal(moved["q"][is_token], residual[is_token]):
        return "changing the presumed q of the first token changes other tokens"
    if torch.equal(moved["k"][is_token], residual[is_token]):
        return "changing the presumed k of the first token changes no other token"
    return None


def _shift_first_token(tap: Tap, shape: tuple[int, int]) -> Callable[[Any], Tensor]:
    """An edit of a module's output that changes one site strongly at the first token of each row."""

    def edit(values: Any) -> Tensor:
        changed = values.detach().clone()
        by_token = tokens_first(changed, shape)
        assert by_token is not None
        part = by_token if tap.columns is None else tap.columns.of(by_token)
        ramp = torch.linspace(-1, 1, part.shape[-1], device=part.device, dtype=part.dtype)
        part[:, 0] += 4 * part.float().std().to(part.dtype) * ramp
        return changed

    return edit


@torch.no_grad()
def _run_to(model: nn.Module, batch: Batch, last: str, edits: Mapping[str, Callable[[Any], Any]]) -> Tensor:
    """(B, T, D) the output of the module `last`, with `edits` applied to the outputs of other modules."""
    outputs: list[Tensor] = []

    def stop(values: Any) -> None:
        by_token = tokens_first(values, batch.shape)
        assert by_token is not None
        outputs.append(by_token.detach().clone())
        raise StopForward

    with hooked(model, on_output={**edits, last: stop}):
        run_model(model, batch)
    return outputs[0]


def _padding_is_harmless(model: nn.Module, batch: Batch, last: str, residual: Tensor) -> bool:
    """Whether the shorter row has the same values alone, without its padding."""
    row, length = int(np.argmin(_LENGTHS)), min(_LENGTHS)
    part = (slice(row, row + 1), slice(length))
    alone = Batch(batch.token_ids[part], batch.attention_mask[part], batch.position_ids[part])
    wanted = _run_to(model, alone, last, {})[0].double()
    distance = (residual[row, :length].double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return bool(distance.max() <= _ROUNDING.get(residual.dtype, 0.15))
