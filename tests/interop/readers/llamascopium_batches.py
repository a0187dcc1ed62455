"""OUT ROOT HOOK: the rows that llamascopium's ActivationFactory makes of chunks."""

import sys

import numpy as np
from llamascopium.activation.factory import (
    ActivationFactory,
    ActivationFactoryActivationsSource,
    ActivationFactoryConfig,
    ActivationFactoryTarget,
)

out, root, hook = sys.argv[1:]
source = ActivationFactoryActivationsSource(path=root, name="exported", num_workers=0, prefetch=None)
config = ActivationFactoryConfig(
    sources=[source], target=ActivationFactoryTarget.ACTIVATIONS_1D, hook_points=[hook], batch_size=4
)
batches = list(ActivationFactory(config).process())
np.savez(
    out,
    values=np.concatenate([batch[hook].float().numpy() for batch in batches]),
    tokens=np.concatenate([batch["tokens"].numpy() for batch in batches]),
)
