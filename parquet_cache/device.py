"""`--device`, checked against what JAX or torch has."""

import jax

from core.base.errors import UsageError

# JAX calls every GPU "gpu", and NVIDIA's among them "cuda" when it is asked for one.
_JAX_NAMES = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}


def require_device(device: str, backend: str) -> None:
    """Makes JAX use the device, or raises UsageError where this machine or the backend has no such device.

    device: "auto", "cpu", "cuda" or "tpu". backend: "jax" or "torch".
    """
    if device == "auto":
        return
    if backend == "torch":
        _require_of_torch(device)
    else:
        _require_of_jax(device)


def _require_of_jax(device: str) -> None:
    before = jax.config.values["jax_platforms"]
    # Without effect where JAX has its devices already; then the comparison decides.
    jax.config.update("jax_platforms", device)
    try:
        found = jax.default_backend()
    except RuntimeError:
        jax.config.update("jax_platforms", before)
        raise UsageError(f"--device {device}: JAX finds none on this machine, or is installed without it") from None
    if found != _JAX_NAMES[device]:
        jax.config.update("jax_platforms", before)
        raise UsageError(f"--device {device}: JAX runs on {found} here")


def _require_of_torch(device: str) -> None:
    from torch_models.loading import best_device

    found = best_device()
    if found != device:
        hint = ": CUDA_VISIBLE_DEVICES= hides the GPU" if (found, device) == ("cuda", "cpu") else ""
        raise UsageError(f"--device {device}: the torch backend runs on {found} here{hint}")
