"""Finds where each site of a transformers model is read, and believes nothing that the numbers do not bear out.

A small random batch goes through the model while every module is watched. A site is what a module takes or gives only
where the claim holds in those numbers:

    resid_pre, residual   what a block takes is what the one before it gave
    attn, mlp             resid_pre + attn + mlp = residual
    resid_mid             some module behind attention takes resid_pre + attn (none does in a parallel block)
    attn_proj, mlp_proj   what the norm that gives attn, or mlp, takes
    attn_heads, mlp_act   what the linear map that gives attn_proj, or mlp_proj, takes
    v                     at the first token, which sees itself alone, the heads put out v
    q, k                  the first token's q changes nothing anywhere, its k does
    embedding             block 0 takes a multiple of it, or differs between rows by what it differs
    final_norm            what the output head takes

A site that is not found so is missing, with the reason.

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
from torch_models.hooks import Batch, StopForward, Tap, hooked, run_model, tokens_first
from torch_models.probe_records import Record
from torch_models.structure import is_within

# Two rows of different lengths, so that the probe has padding; no axis of a small model is likely to be 7 long.
_LENGTHS = (7, 4)
_SEED = 0
# A padded row may differ from the row alone by rounding, which grows over the layers; a real mistake is of order 1.
_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class Taps:
    """Where the sites of a model are read.

    Attributes:
      found: (site, layer) → tap.
      missing: site → why it cannot be captured, in the first layer that lacks it.
      widths: site → values a token has there.
      rows_alone: padding changes what a row gives, so each row has to run without.
    """

    found: Mapping[tuple[str, int], Tap]
    missing: Mapping[str, str]
    widths: Mapping[str, int]
    rows_alone: bool


def probe_batch(vocab_size: int, device: torch.device | str = "cpu") -> Batch:
    """Random tokens in rows of `_LENGTHS`, padded on the right; no token stands twice in one place."""
    rng = np.random.default_rng(_SEED)
    rows, longest = len(_LENGTHS), max(_LENGTHS)
    tokens = rng.permuted(np.tile(np.arange(vocab_size), (longest, 1)), axis=1)[:, :rows].T
    mask = np.arange(longest)[None] < np.array(_LENGTHS)[:, None]
    places = np.where(mask, np.arange(longest)[None], 0)
    arrays = (np.ascontiguousarray(array, np.int64) for array in (np.where(mask, tokens, 0), mask, places))
    return Batch(*(torch.from_numpy(array).to(device) for array in arrays))


@torch.no_grad()
def find_taps(model: nn.Module, layers_path: str, n_layers: int, *, n_heads: int, vocab_size: int, whole: bool) -> Taps:
    """The taps of the first `n_layers` blocks of `model` (all it has left).

    n_heads: query heads of a layer. whole: no block was cut off, so the final norm can be found too.
    Raises ModelError when the blocks do not form one residual stream.
    """
    batch = probe_batch(vocab_size, next(model.parameters()).device)
    paths = [f"{layers_path}.{layer}" for layer in range(n_layers)]
    last = paths[-1]
    record = _watch(model, batch, None if whole else last)
    blocks = [BlockProbe(model, record, path, batch, n_heads) for path in paths]
    _check_stream(model, blocks)
    claims: dict[tuple[str, int], Tap | str] = {
        (site, layer): tap for layer, block in enumerate(blocks) for site, tap in block.taps().items()
    }
    claims["embedding", EMBEDDING_LAYER] = _embedding(model, record, paths[0], batch)
    claims["final_norm", n_layers] = _final_norm(model, record, layers_path) if whole else "blocks were cut off"
    found = {key: tap for key, tap in claims.items() if isinstance(tap, Tap)}
    missing = {site: f"layer {layer}: {why}" for (site, layer), why in reversed(claims.items()) if isinstance(why, str)}
    widths, refused = _widths(record, found)
    if ("q", 0) in found and (fault := _query_fault(model, batch, found, last, blocks[-1].residual)):
        refused |= {"q": fault, "k": fault}
    found = {key: tap for key, tap in found.items() if key[0] not in refused}
    return Taps(found, missing | refused, widths, not _padding_is_harmless(model, batch, last, blocks[-1].residual))


def _widths(record: Record, found: Mapping[tuple[str, int], Tap]) -> tuple[dict[str, int], dict[str, str]]:
    """Site → width, and what is wrong with the sites that are not equally wide in all layers."""
    widths: dict[str, int] = {}
    uneven = {}
    for (site, layer), tap in found.items():
        width = _width(record, tap)
        if width != widths.setdefault(site, width):
            uneven[site] = f"layer {layer}: it is {width} wide there, {widths[site]} elsewhere"
    return widths, uneven


def _width(record: Record, tap: Tap) -> int:
    call = record.calls[tap.module]
    seen = call.took if tap.of_input else call.gave
    assert seen is not None
    return tap.read(seen).shape[-1]


def _watch(model: nn.Module, batch: Batch, last: str | None) -> Record:
    """Runs the probe with every module watched, to the end or to the module `last`."""
    record = Record(batch.shape)
    names = [name for name, _ in model.named_modules()]
    on_output = {name: record.ended(name) for name in names}
    if last is not None:
        end = on_output[last]

        def stop(values: Any) -> None:
            end(values)
            raise StopForward

        on_output[last] = stop
    with hooked(model, on_input={name: record.began(name) for name in names}, on_output=on_output):
        run_model(model, batch)
    return record


def _check_stream(model: nn.Module, blocks: Sequence[BlockProbe]) -> None:
    """Raises ModelError unless each block ran once and took what the one before it gave."""
    kind = type(model).__name__
    for layer, block in enumerate(blocks):
        if block.call is None or block.call.took is None or block.call.gave is None:
            raise ModelError(f"{kind}: block {layer} does not take and give one vector a token: it cannot be captured")
        if layer and not torch.equal(block.resid_pre, blocks[layer - 1].residual):
            raise ModelError(f"{kind}: block {layer} does not take what block {layer - 1} gave: it cannot be captured")


def _embedding(model: nn.Module, record: Record, block: str, batch: Batch) -> Tap | str:
    """What block 0 takes when that is a multiple of the token embedding; the embedding where positions are added."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is embedding), None)
    call, first = record.once(name or ""), record.once(block)
    assert first is not None
    assert first.took is not None
    if name is None or call is None or call.gave is None or call.gave.shape != first.took.shape:
        return "the token embedding is not as wide as the residual stream"
    is_token = batch.attention_mask.bool()
    embedded, taken = call.gave[is_token].double(), first.took[is_token].double()
    eps = 4 * torch.finfo(first.took.dtype).eps
    multiple = (embedded * taken).sum() / (embedded * embedded).sum()
    if bool((taken - multiple * embedded).norm() <= eps * taken.norm()):
        return Tap(block, of_input=True)
    both = min(_LENGTHS)
    gave, took = (values[:, :both].double() for values in (call.gave, first.took))
    off = (gave[0] - gave[1]) - (took[0] - took[1])
    scale = gave.abs().sum(0) + took.abs().sum(0)
    if bool((off.abs() <= eps * scale).all()):
        return Tap(name)
    return "more than a scale and positions lies between the token embedding and block 0"


def _final_norm(model: nn.Module, record: Record, layers_path: str) -> Tap | str:
    """The first module outside of the blocks whose result the output head takes."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    name = next((name for name, module in model.named_modules() if module is head), None)
    call = record.once(name) if name is not None else None
    if call is None or call.took is None:
        return "the model has no output head"
    before = sorted(
        (other.ended, path)
        for path in record.calls
        if not is_within(path, layers_path) and (other := record.once(path)) is not None and other.ended < call.began
    )
    for _, path in before:
        gave = record.calls[path].gave
        # Some heads cast what they take.
        if gave is not None and torch.equal(gave.to(call.took.dtype), call.took):
            return Tap(path)
    return "no module gives what the output head takes"


def _query_fault(
    model: nn.Module, batch: Batch, taps: Mapping[tuple[str, int], Tap], last: str, residual: Tensor
) -> str | None:
    """What is wrong with q and k: the first token sees itself alone whatever its q, and its k is seen by the others."""
    moved = {}
    for site in "qk":
        edits = {tap.module: _shift_first_token(tap, batch.shape) for (s, _), tap in taps.items() if s == site}
        moved[site] = _run_to(model, batch, last, edits)
    is_token = batch.attention_mask.bool()
    if not torch.equal(moved["q"][is_token], residual[is_token]):
        return "what looks like q is seen by other tokens"
    if torch.equal(moved["k"][is_token], residual[is_token]):
        return "what looks like k is seen by no other token"
    return None


def _shift_first_token(tap: Tap, shape: tuple[int, int]) -> Callable[[Any], Tensor]:
    """An edit of a module's result that moves one site far away at the first token of each row."""

    def edit(values: Any) -> Tensor:
        changed = values.detach().clone()
        seen = tokens_first(changed, shape)
        assert seen is not None
        part = seen if tap.columns is None else tap.columns.of(seen)
        ramp = torch.linspace(-1, 1, part.shape[-1], device=part.device, dtype=part.dtype)
        part[:, 0] += 4 * part.float().std().to(part.dtype) * ramp
        return changed

    return edit


@torch.no_grad()
def _run_to(model: nn.Module, batch: Batch, last: str, edits: Mapping[str, Callable[[Any], Any]]) -> Tensor:
    """(B, T, D) what the module `last` gives with `edits` made on the way."""
    seen: list[Tensor] = []

    def stop(values: Any) -> None:
        given = tokens_first(values, batch.shape)
        assert given is not None
        seen.append(given.detach().clone())
        raise StopForward

    with hooked(model, on_output={**edits, last: stop}):
        run_model(model, batch)
    return seen[0]


def _padding_is_harmless(model: nn.Module, batch: Batch, last: str, residual: Tensor) -> bool:
    """Whether the shorter row gives the same without its padding and the other row."""
    row, length = int(np.argmin(_LENGTHS)), min(_LENGTHS)
    part = (slice(row, row + 1), slice(length))
    alone = Batch(batch.token_ids[part], batch.attention_mask[part], batch.position_ids[part])
    wanted = _run_to(model, alone, last, {})[0].double()
    distance = (residual[row, :length].double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return bool(distance.max() <= _ROUNDING.get(residual.dtype, 0.15))
