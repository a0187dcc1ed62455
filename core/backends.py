"""The backends by name: `--backend`."""

from core.base.errors import RunError, UsageError
from core.step.backend import Backend

BACKENDS = ("auto", "jax", "torch")
# The layouts that one device satisfies.
_ONE_DEVICE = ("auto", "1d")


def choose_backend(
    name: str,
    path: str,
    revision: str | None = None,
    *,
    mesh: str = "auto",
    weights_cache_dir: str | None = None,
    trust_remote_code: bool = False,
) -> Backend:
    """The backend of that name; "auto" is JAX for the families of `qwen2_jax`, torch for all others.

    mesh: how JAX's devices share the work, see `device_mesh`. weights_cache_dir: where JAX may find converted
    weights.
    trust_remote_code: run the code that a model brings, which torch alone can. Raises UsageError for what the backend
    cannot do, RunError when torch is not installed, ModelError when there is no such model.
    """
    if name not in BACKENDS:
        raise UsageError(f"--backend {name}: must be one of {', '.join(BACKENDS)}")
    family = _unknown_family(path, revision) if name == "auto" else None
    if name != "torch" and family is None:
        if trust_remote_code:
            raise UsageError("--trust_remote_code: the JAX backend runs no code of models: add --backend torch")
        from core.jax_utils import JaxBackend

        return JaxBackend(mesh, weights_cache_dir)
    if mesh not in _ONE_DEVICE:
        raise UsageError(f"--mesh {mesh}: the torch backend runs on one device: leave --mesh out")
    wanted_by = "--backend torch"
    if family is not None:
        wanted_by = f"{path}: {family} is no family of the JAX backend, and {wanted_by}"
    return _torch_backend(wanted_by, trust_remote_code)


def _unknown_family(path: str, revision: str | None) -> str | None:
    """The `model_type` of a model that JAX does not know; None for one that it knows, and for GGUF files."""
    from qwen2_jax.checkpoints.locate import CONFIG_FILES, find_gguf, locate_model
    from qwen2_jax.families import FAMILIES
    from qwen2_jax.mapping.hf_config import read_config_json

    if find_gguf(path) is not None:
        return None
    family = read_config_json(locate_model(path, revision, CONFIG_FILES)).get("model_type")
    return None if family in FAMILIES else str(family)


def _torch_backend(wanted_by: str, trust_remote_code: bool) -> Backend:
    from core.base.errors import ModelError
    from torch_models import require_torch

    try:
        require_torch(wanted_by)
    except ModelError as error:
        raise RunError(str(error)) from error
    from torch_models.backend import TorchBackend

    return TorchBackend(trust_remote_code)
