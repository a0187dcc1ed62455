"""Causal language models of transformers, with activations of the sites in `qwen2_jax.taps`.

torch is an optional dependency: the modules are imported only when needed, and `require_torch` says what to install.
"""

import importlib.util

from core.base.errors import ModelError

INSTALL_TORCH = "pip install -c constraints.txt -e '.[torch]'"


def require_torch(wanted_by: str) -> None:
    """Raises ModelError naming the extra when torch is not installed. wanted_by: what needs it, such as a flag."""
    if importlib.util.find_spec("torch") is None:
        raise ModelError(f"{wanted_by} needs torch: {INSTALL_TORCH}")
