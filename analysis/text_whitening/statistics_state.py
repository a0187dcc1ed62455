"""The moments of the texts so far, saved after each chunk: a pass that is interrupted goes on with the same bits."""

from dataclasses import dataclass

from analysis.whitening.incremental import IncrementalWhitener
from core.base.canonical_json import canonical_json
from core.base.errors import RunError
from core.object_store import ObjectStore
from core.object_store.single_file import read_json_object

_STATE = "statistics/state.json"


@dataclass(frozen=True)
class StatisticsState:
    """chunks: how many the moments cover. texts: the digest of the last of them. is_complete: of the whole dataset."""

    chunks: int = 0
    texts: str = ""
    is_complete: bool = False


def load_state(store: ObjectStore, new: IncrementalWhitener) -> tuple[StatisticsState, IncrementalWhitener]:
    """What was saved last; nothing, and `new`, in a folder without it. Raises RunError for a damaged file."""
    try:
        found = read_json_object(store, _STATE)
    except FileNotFoundError:
        return StatisticsState(), new
    try:
        state = StatisticsState(int(found["chunks"]), str(found["texts"]), bool(found["is_complete"]))
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(f"{store.url}/{_STATE}: it is damaged: delete {store.url}/statistics") from error
    return state, IncrementalWhitener.load(f"{store.url}/{_moments_name(state.chunks)}")


def save_state(store: ObjectStore, state: StatisticsState, whitener: IncrementalWhitener) -> None:
    """Saves the moments under a name of their own, then the state that names them, then removes those before."""
    whitener.save(f"{store.url}/{_moments_name(state.chunks)}")
    store.replace_bytes(_STATE, canonical_json(vars(state)))
    for name in store.list("statistics/"):
        if name not in (_STATE, _moments_name(state.chunks)):
            store.delete(name)


def _moments_name(chunks: int) -> str:
    return f"statistics/moments_{chunks:06d}.safetensors"
