"""Batches of tokens for other libraries, each of which is imported when its function is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.base.errors import UsageError
from core.reading.activations import Activations

if TYPE_CHECKING:
    from core.reading.adapters.grain_tokens import GrainTokens
    from core.reading.adapters.torch_tokens import TorchTokens


def torch_dataset(
    acts: Activations, *, rank: int | None = None, world_size: int | None = None, **settings: Any
) -> TorchTokens:
    """A `torch.utils.data.IterableDataset` of batches: dicts of tensors. settings: the arguments of `acts.tokens`.

    rank, world_size: of this process; by default those of `torch.distributed`, or 0 of 1.
    Pass it to a `DataLoader` with batch_size=None. Raises UsageError for settings that do not fit, or without torch.
    """
    try:
        from core.reading.adapters.torch_tokens import TorchTokens
    except ImportError as error:
        raise UsageError(
            f"torch_dataset needs torch ({error}): pip install -c constraints.txt -e '.[torch]'"
        ) from error
    return TorchTokens(acts, rank=rank, world_size=world_size, **settings)


def grain_dataset(acts: Activations, **settings: Any) -> GrainTokens:
    """A `grain.IterDataset` of batches: dicts of arrays. settings: the arguments of `acts.tokens`.

    Its iterators have Grain's `get_state` and `set_state`, and Grain's workers (`mp_prefetch`) share the shards.
    Raises UsageError for settings that do not fit, or without grain.
    """
    try:
        from core.reading.adapters.grain_tokens import GrainTokens
    except ImportError as error:
        raise UsageError(
            f"grain_dataset needs grain ({error}): pip install -c constraints.txt -e '.[grain]'"
        ) from error
    return GrainTokens(acts, **settings)
