"""Finds the sites of one decoder layer from its modules' inputs and outputs: see `torch_models.probing`.

Axis letters: B rows, T tokens, D d_model, N query heads, K kv heads, H head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qwen2_jax.taps import SITES
from torch_models.call_log import Call, CallLog
from torch_models.hooks import Batch, Columns, Tap
from torch_models.structure import attention_of, is_norm, is_within, linear_sizes


class BlockProbe:
    """One decoder layer during the probe."""

    def __init__(self, model: nn.Module, log: CallLog, path: str, batch: Batch, n_heads: int) -> None:
        self.path = path
        self.call = log.once(path)
        self._layer = model.get_submodule(path)
        self._is_token = batch.attention_mask.bool()
        self._n_heads = n_heads
        names = (name for name, _ in self._layer.named_modules() if name)
        calls = {name: log.once(f"{path}.{name}") for name in names}
        self._calls = {name: call for name, call in calls.items() if call is not None}

    @property
    def resid_pre(self) -> Tensor:
        """(B, T, D) the block's input."""
        assert self.call is not None
        assert self.call.input is not None
        return self.call.input

    @property
    def residual(self) -> Tensor:
        """(B, T, D) the block's output."""
        assert self.call is not None
        assert self.call.output is not None
        return self.call.output

    def taps(self) -> dict[str, Tap | str]:
        """Site → its tap, or why there is none; sites that this kind of block does not have are absent."""
        whole: dict[str, Tap | str] = {"resid_pre": Tap(self.path, of_input=True), "residual": Tap(self.path)}
        attention = attention_of(self._layer)
        if attention is None or attention not in self._calls:
            return whole | dict.fromkeys(("attn", "mlp", "resid_mid"), "it has no attention that runs exactly once")
        pair = self._contributions(attention)
        if pair is None:
            reason = "no two module outputs satisfy resid_pre + attn + mlp = residual"
            return whole | dict.fromkeys(_INSIDE, reason)
        attn, mlp = pair
        parts = {"attn": Tap(attn), "mlp": Tap(mlp)} | self._middle(attn, attention)
        parts |= self._projected(attn, mlp, attention)
        return whole | {
            site: replace(tap, module=f"{self.path}.{tap.module}") if isinstance(tap, Tap) else tap
            for site, tap in parts.items()
        }

    def _contributions(self, attention: str) -> tuple[str, str] | None:
        """The modules whose outputs attention and the MLP add to the residual stream; None if there are no such two."""
        width = self.resid_pre.shape[-1]
        wide = [name for name, call in self._by_end() if call.output is not None and call.output.shape[-1] == width]
        end = self._calls[attention].ended
        inside = [name for name in wide if is_within(name, attention)]
        after = [name for name in wide if self._calls[name].began > end]
        # Attention as a whole comes before the modules inside it, and norms after it come last.
        for attn in [*reversed(inside), *after]:
            for mlp in after:
                if attn != mlp and self._adds_up(self._output(attn), self._output(mlp)):
                    return attn, mlp
        return None

    def _by_end(self) -> list[tuple[str, Call]]:
        return sorted(self._calls.items(), key=lambda entry: entry[1].ended)

    def _output(self, name: str) -> Tensor:
        output = self._calls[name].output
        assert output is not None
        return output

    def _adds_up(self, attn: Tensor, mlp: Tensor) -> bool:
        parts = [tensor[self._is_token].double() for tensor in (self.resid_pre, attn, mlp)]
        return is_sum(self.residual[self._is_token].double(), parts, self.resid_pre.dtype)

    def _middle(self, attn: str, attention: str) -> dict[str, Tap | str]:
        """resid_mid, of a sequential block."""
        parts = [tensor[self._is_token].double() for tensor in (self.resid_pre, self._output(attn))]
        for name, call in sorted(self._calls.items(), key=lambda entry: entry[1].began):
            values = call.input
            if call.began < self._calls[attention].ended or values is None or values.shape != self.resid_pre.shape:
                continue
            if is_sum(values[self._is_token].double(), parts, self.resid_pre.dtype):
                return {"resid_mid": Tap(name, of_input=True)}
        return {}

    def _projected(self, attn: str, mlp: str, attention: str) -> dict[str, Tap | str]:
        """attn_proj and mlp_proj where norms compute attn and mlp; heads, neurons, queries, keys and values."""
        taps: dict[str, Tap | str] = {}
        outputs = {"attn": self._output(attn), "mlp": self._output(mlp)}
        for site, name in (("attn", attn), ("mlp", mlp)):
            values = self._calls[name].input
            if is_norm(name, self._layer.get_submodule(name)) and values is not None:
                taps[f"{site}_proj"], outputs[site] = Tap(name, of_input=True), values
        end = self._calls[attention].ended
        inside = [name for name in self._linear() if is_within(name, attention)]
        after = [name for name in self._linear() if self._calls[name].began > end]
        down = self._with_output(after, outputs["mlp"])
        taps["mlp_act"] = Tap(down, of_input=True) if down else "no single linear map outputs what the MLP adds"
        output = self._with_output(inside, outputs["attn"])
        if output is None:
            return taps | dict.fromkeys(_HEADS, "no linear map outputs what attention adds")
        taps["attn_heads"] = Tap(output, of_input=True)
        return taps | self._queries([name for name in inside if name != output], self._calls[output].input)

    def _linear(self) -> list[str]:
        """The linear maps, in the order in which they ran."""
        return [name for name, _ in self._by_end() if linear_sizes(self._layer.get_submodule(name)) is not None]

    def _with_output(self, names: Sequence[str], values: Tensor) -> str | None:
        """The last of the linear maps whose output is `values`."""
        same = [
            name
            for name in names
            if self._calls[name].output is not None and is_same(self._output(name), values, self._is_token)
        ]
        return same[-1] if same else None

    def _queries(self, names: Sequence[str], heads: Tensor | None) -> dict[str, Tap | str]:
        """q, k and v from three linear maps or the columns of one, where v is the heads' output at token 0."""
        assert heads is not None
        for candidate in self._candidates(names, heads.shape[-1]):
            v = candidate["v"].read(self._output(candidate["v"].module))
            if self._attends_to_itself(heads[:, 0], v[:, 0]):
                return dict(candidate)
        reason = "no projection outputs the v that the heads output at the first token"
        return dict.fromkeys(("q", "k", "v"), reason)

    def _candidates(self, names: Sequence[str], width: int) -> Iterator[dict[str, Tap]]:
        if len(names) == 3:
            for v in reversed(names):
                q, k = (name for name in names if name != v)
                yield {"q": Tap(q), "k": Tap(k), "v": Tap(v)}
        if len(names) != 1 or self._calls[names[0]].output is None or width % self._n_heads:
            return
        name, head_dim = names[0], width // self._n_heads
        rest = self._output(name).shape[-1] - width
        if rest <= 0 or rest % (2 * head_dim):
            return
        kv = rest // 2
        kv_heads = kv // head_dim
        # All queries, then all keys, then all values.
        bounds = {"q": (0, width), "k": (width, width + kv), "v": (width + kv, width + rest)}
        yield {site: Tap(name, columns=Columns(1, start, stop)) for site, (start, stop) in bounds.items()}
        # For each kv head its queries, its key and its value.
        if self._n_heads % kv_heads == 0:
            queries = self._n_heads // kv_heads * head_dim
            bounds = {
                "q": (0, queries),
                "k": (queries, queries + head_dim),
                "v": (queries + head_dim, queries + 2 * head_dim),
            }
            yield {site: Tap(name, columns=Columns(kv_heads, *span)) for site, span in bounds.items()}

    def _attends_to_itself(self, heads: Tensor, v: Tensor) -> bool:
        """Whether the heads' output is v at the first token; heads: (B, N·H), v: (B, K·H)."""
        if heads.shape[-1] % self._n_heads or v.shape[-1] % (heads.shape[-1] // self._n_heads):
            return False
        by_head = v.unflatten(-1, (-1, heads.shape[-1] // self._n_heads))
        if self._n_heads % by_head.shape[-2]:
            return False
        repeated = by_head.repeat_interleave(self._n_heads // by_head.shape[-2], dim=-2).flatten(-2)
        return is_same(repeated, heads, torch.ones(heads.shape[0], dtype=torch.bool, device=heads.device))


_HEADS = ("attn_heads", "q", "k", "v")
_INSIDE = tuple(site for site in SITES if SITES[site].per_layer and site not in ("resid_pre", "residual"))


def is_sum(total: Tensor, parts: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether `parts` add up to `total` (…, D, float64) up to the roundings of `dtype`, and each of them matters.

    The second half is for streams so large beside a part that leaving it out would be a rounding too.
    """
    if any(part.shape != total.shape for part in parts):
        return False
    difference = (total - sum(parts)).abs()
    scale = sum(part.abs() for part in parts) + total.abs()
    if not bool((difference <= 2 * torch.finfo(dtype).eps * scale).all()):
        return False
    off = difference.norm(dim=-1).median()
    return all(bool(off <= 0.25 * part.norm(dim=-1).median()) and bool(part.any()) for part in parts[1:])


def is_same(one: Tensor, other: Tensor, where: Tensor) -> bool:
    """Whether two tensors agree on the tokens `where` up to two roundings."""
    if one.shape != other.shape:
        return False
    a, b = one[where].double(), other[where].double()
    return bool(((a - b).abs() <= 2 * torch.finfo(one.dtype).eps * b.abs()).all()) and bool(b.any())
