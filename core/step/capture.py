"""From the names and layers of the command line to what is captured, and what that costs a token."""

from collections import defaultdict
from collections.abc import Sequence

from core.base.dtypes import DTYPES
from core.base.errors import ModelError, UsageError
from core.step.model_shape import ModelShape
from qwen2_jax.mapping.hook_names import parse_hook_name
from qwen2_jax.taps import SITES, Capture


def resolve_capture(names: Sequence[str], layers: Sequence[int] | None, model: ModelShape, path: str) -> Capture:
    """The sites and layers that `--activation_type` and `--layers_to_extract` ask for.

    A name may carry a layer number. All sites that a block has are captured at the same layers: those of the numbers,
    else `layers`, else all. Raises UsageError where that is contradictory, or the model has no such site or layer.
    """
    numbered: dict[str, set[int]] = defaultdict(set)
    unnumbered: dict[str, str] = {}
    spelled: dict[str, str] = {}
    for name in names:
        try:
            hook = parse_hook_name(name, tuple(model.site_widths))
        except ModelError as error:
            raise UsageError(f"--activation_type {name}: {error}") from error
        spelled.setdefault(hook.site, name)
        if hook.layer is None:
            unnumbered[hook.site] = name
        else:
            numbered[hook.site].add(existing_layer(hook.layer, f"--activation_type {name}", model, path))
    given = None if layers is None else {existing_layer(i, f"--layers_to_extract {i}", model, path) for i in layers}
    wanted = {site: _layers_of(site, numbered, unnumbered, given, model.n_layers) for site in spelled}
    of_blocks = {spelled[site]: layers for site, layers in wanted.items() if SITES[site].per_layer}
    if not of_blocks and layers is not None:
        raise UsageError(
            f"--layers_to_extract: {' and '.join(spelled)} is not there once a layer: leave the layers out"
        )
    # In the order of the registry and once each: the same sites are the same run however they are listed.
    return Capture(_one_set(of_blocks, given), tuple(site for site in SITES if site in spelled))


def existing_layer(layer: int, flag: str, model: ModelShape, path: str) -> int:
    """`layer`, if the model at `path` has it; raises UsageError naming `flag` if not."""
    if not 0 <= layer < model.n_layers:
        raise UsageError(f"{flag}: {path} has layers 0 to {model.n_layers - 1}")
    return layer


def _layers_of(
    site: str, numbered: dict[str, set[int]], unnumbered: dict[str, str], given: set[int] | None, n_layers: int
) -> set[int]:
    default = set(range(n_layers)) if given is None else given
    return numbered.get(site, set()) | (default if site in unnumbered else set())


def _one_set(of_blocks: dict[str, set[int]], given: set[int] | None) -> tuple[int, ...]:
    """`of_blocks` goes from a site as the user spelled it to its layers."""
    first = next(iter(of_blocks), None)
    if first is None:
        return ()
    for name, layers in of_blocks.items():
        if given is not None and layers != given:
            raise UsageError(
                f"--activation_type {name} is layer {_listed(layers)}, --layers_to_extract {_listed(given)}: "
                "all sites of a run have the same layers"
            )
        if layers != of_blocks[first]:
            raise UsageError(
                f"--activation_type: {first} is asked for at layer {_listed(of_blocks[first])}, {name} at "
                f"{_listed(layers)}: all sites of a run have the same layers"
            )
    return tuple(sorted(of_blocks[first]))


def _listed(layers: set[int]) -> str:
    ordered = sorted(layers)
    consecutive = len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1
    return f"{ordered[0]} to {ordered[-1]}" if consecutive else " ".join(map(str, ordered))


def site_bytes(capture: Capture, model: ModelShape, dtype: str) -> dict[str, int]:
    """By site, the stored bytes of one token in all its layers, before compression."""
    return {
        site: len(capture.layers_of(site, model.n_layers)) * model.site_widths[site] * DTYPES[dtype].itemsize
        for site in capture.sites
    }
