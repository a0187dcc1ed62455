"""Which tokens of a sample are stored: token ids, positions and norms in, one reason for each token out.

The rules apply in the order of REASONS, each to the tokens that the previous ones left, so that each dropped token has
one reason. All but the norms are known before the forward pass.

Axis letters: T tokens of a sample, P pairs of a residual-stream site and a layer.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int32, UInt8

from core.base.errors import UsageError

TOKEN_KINDS = ("bos", "pad", "eos", "special", "newline_first")
REASONS = (*TOKEN_KINDS, "position", "norm_outlier", "limit")
"""Why a token is not stored. Reason i has the code i + 1; the code of a stored token is 0."""
TOKEN_CHOICES = ("first", "last", "random")
NORM_SITES = ("resid_pre", "resid_mid", "residual")
"""The sites of the residual stream, whose norms decide whether a token is an outlier."""

Reasons = UInt8[np.ndarray, "T"]
_POSITIONS = re.compile(r"(-?\d+)?:(-?\d+)?")


@dataclass(frozen=True)
class TokenFacts:
    """A tokenizer's facts about token ids.

    Attributes:
      ids: the token ids of each kind but `newline_first`.
      ends_line: whether a token's text ends with a line feed.
    """

    ids: Mapping[str, frozenset[int]]
    ends_line: Callable[[int], bool]


def token_facts(tokenizer: Any) -> TokenFacts:
    """The facts of a transformers tokenizer. All tokens that it marks as special are, including those of chats."""
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {kind: frozenset({getattr(tokenizer, f"{kind}_token_id")} - {None}) for kind in ("bos", "pad", "eos")}
    ids["special"] = frozenset(special | set(tokenizer.all_special_ids))
    known: dict[int, bool] = {}

    def ends_line(token: int) -> bool:
        if token not in known:
            known[token] = tokenizer.decode([token], clean_up_tokenization_spaces=False).endswith("\n")
        return known[token]

    return TokenFacts(ids, ends_line)


@dataclass(frozen=True)
class Selection:
    """The rules of a run; part of its identity.

    Attributes:
      exclude: of TOKEN_KINDS, in their order.
      positions: ranges as Python slices a sample's tokens; a token outside all of them is dropped. Empty: no rule.
      outlier_factor: a token is dropped when its L2 norm, in any stored layer of any stored NORM_SITES, exceeds this
        many times the median norm, at that site and layer, of the sample's tokens that the previous rules left.
      max_tokens: maximum number of the tokens that are left then, chosen by `choice`.
      seed: of the random choice, which depends only on it and on the sample's index.
    """

    exclude: tuple[str, ...] = ()
    positions: tuple[tuple[int | None, int | None], ...] = ()
    outlier_factor: float | None = None
    max_tokens: int | None = None
    choice: str = "first"
    seed: int = 0

    @property
    def needs_norms(self) -> bool:
        """Whether norms decide, so that the stored tokens are known only after the forward pass."""
        return self.outlier_factor is not None

    def to_json(self) -> dict[str, Any]:
        """The rules as in the identity, under the names of their flags."""
        return {
            "exclude_tokens": list(self.exclude),
            "positions": [":".join("" if end is None else str(end) for end in range_) for range_ in self.positions],
            "exclude_norm_outliers": self.outlier_factor,
            "max_tokens_per_sample": self.max_tokens,
            "token_choice": None if self.max_tokens is None else self.choice,
        }

    def before(self, token_ids: Int32[np.ndarray, "T"], sample_idx: int, facts: TokenFacts | None) -> Reasons:
        """The reasons known before the forward pass: all of them when no norms are needed.

        facts: may be None where no kind of token is excluded.
        """
        reasons = np.zeros(len(token_ids), np.uint8)
        for kind in self.exclude:
            assert facts is not None
            _drop(reasons, _is_kind(kind, token_ids, facts), kind)
        if self.positions:
            inside = np.zeros(len(token_ids), bool)
            for start, stop in self.positions:
                inside[slice(start, stop)] = True
            _drop(reasons, ~inside, "position")
        return reasons if self.needs_norms else self._limited(reasons, sample_idx)

    def after(self, reasons: Reasons, norms: Float[np.ndarray, "P T"], sample_idx: int) -> Reasons:
        """The final reasons, from those of `before` and the norms.

        A norm that is not finite is not an outlier: the model computed NaN or infinity, which must be reported.
        """
        assert self.outlier_factor is not None
        final, kept = reasons.copy(), reasons == 0
        if kept.any():
            exact = norms.astype(np.float64)
            limits = self.outlier_factor * np.median(exact[:, kept], axis=1, keepdims=True)
            _drop(final, np.any((exact > limits) & np.isfinite(exact), axis=0), "norm_outlier")
        return self._limited(final, sample_idx)

    def most_kept(self, reasons: Reasons) -> int:
        """The maximum number of tokens that will be stored, given the reasons of `before`."""
        left = int(np.count_nonzero(reasons == 0))
        return left if self.max_tokens is None else min(left, self.max_tokens)

    def _limited(self, reasons: Reasons, sample_idx: int) -> Reasons:
        places = np.flatnonzero(reasons == 0)
        if self.max_tokens is None or len(places) <= self.max_tokens:
            return reasons
        if self.choice == "random":
            # Raw PCG64 words are the only random stream that numpy guarantees across versions. One word per token, so
            # that a token's word does not depend on which other tokens were dropped.
            words = np.random.PCG64(np.random.SeedSequence([self.seed, sample_idx])).random_raw(len(reasons))
            places = places[np.argsort(words[places], kind="stable")]
        chosen = places[-self.max_tokens :] if self.choice == "last" else places[: self.max_tokens]
        unchosen = np.ones(len(reasons), bool)
        unchosen[chosen] = False
        _drop(reasons, unchosen, "limit")
        return reasons


def _is_kind(kind: str, token_ids: Int32[np.ndarray, "T"], facts: TokenFacts) -> Bool[np.ndarray, "T"]:
    if kind != "newline_first":
        return np.isin(token_ids, sorted(facts.ids[kind]))
    distinct, inverse = np.unique(token_ids, return_inverse=True)
    ends = np.array([facts.ends_line(int(token)) for token in distinct], bool)[inverse]
    return np.concatenate([[False], ends[:-1]])


def _drop(reasons: Reasons, which: Bool[np.ndarray, "T"], reason: str) -> None:
    """Sets the reason of `which` tokens in place; a token that has a reason keeps it."""
    reasons[which & (reasons == 0)] = REASONS.index(reason) + 1


def parse_positions(text: str) -> tuple[int | None, int | None]:
    """Parses `START:STOP`; either end may be left out or negative. Raises UsageError."""
    match = _POSITIONS.fullmatch(text)
    if match is None:
        raise UsageError(f"--positions {text}: expected START:STOP, such as 0:128, -8: or 1:-1")
    start, stop = (None if end is None else int(end) for end in match.groups())
    return start or 0, stop


def dropped_ranges(reasons: Reasons) -> dict[str, list[list[int]]]:
    """Reason → the runs of tokens that have it, each [first, one past the last]."""
    edges = np.flatnonzero(np.diff(reasons)) + 1
    ranges: dict[str, list[list[int]]] = {}
    for start, stop in pairwise([0, *edges.tolist(), len(reasons)]):
        if start < stop and reasons[start]:
            ranges.setdefault(REASONS[reasons[start] - 1], []).append([start, stop])
    return ranges


def reasons_from_ranges(ranges: Any, n_tokens: int) -> Reasons:
    """The inverse of `dropped_ranges`. Raises ValueError for ranges that do not fit `n_tokens` tokens."""
    reasons = np.zeros(n_tokens, np.uint8)
    if not isinstance(ranges, dict) or not ranges.keys() <= set(REASONS):
        raise ValueError(f"unknown reasons: they must be among {', '.join(REASONS)}")
    for reason, runs in ranges.items():
        for run in runs if isinstance(runs, list) else [runs]:
            if not (isinstance(run, list) and len(run) == 2 and all(type(end) is int for end in run)):
                raise ValueError(f"{run!r} is not a run of tokens")
            start, stop = run
            if not 0 <= start < stop <= n_tokens or reasons[start:stop].any():
                raise ValueError(f"the run {run} of {reason} overlaps another or lies outside of the sample")
            reasons[start:stop] = REASONS.index(reason) + 1
    return reasons


def count_reasons(all_reasons: Iterable[Reasons]) -> dict[str, int]:
    """Reason → how many tokens have it; reasons that no token has are left out."""
    counts: Counter[int] = Counter()
    for reasons in all_reasons:
        counts.update(dict(enumerate(np.bincount(reasons).tolist())))
    return {reason: counts[code] for code, reason in enumerate(REASONS, 1) if counts[code]}
