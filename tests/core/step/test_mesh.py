"""Models split over the devices of a host: the same numbers as on one device, and less on each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.base.errors import RunError
from core.step.device_mesh import model_parallelism

# Three kv heads and five heads share no factor with the mesh: their attention is on every device.
MOST_HELD = {"llama": 0.7, "gpt2": 0.8, "gpt_neox": 0.5, "qwen2": 0.5}
ROOT = Path(__file__).parents[3]


def report_of_every_family():
    """By family and number of devices that share a model: how far the numbers are off, and what a device holds."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    script = Path(__file__).with_name("mesh_equality.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# One test, since all families compile in one process.
def test_a_split_model_equals_one_device_and_each_device_holds_the_share_foretold():
    for name, found in report_of_every_family().items():
        family, model_parallel = name.split()
        for part in ("all", "gathered", "peaks", "norms"):
            assert found[part] < 1e-5, (name, part, found)
        assert found["foretold"] == found["held"], name
        assert model_parallel != "4" or found["held"] < MOST_HELD.get(family, 0.3), (name, found)


# Of 8 devices with 100 bytes each, of which the weights may take 60.
@pytest.mark.parametrize(
    ("shares", "expected"),
    [({1: 60, 2: 30, 4: 15, 8: 8}, 1), ({1: 61, 2: 31, 4: 16, 8: 8}, 2), ({1: 200, 2: 110, 4: 60, 8: 70}, 4)],
)
def test_auto_splits_the_model_over_as_few_devices_as_have_room_for_their_share(shares, expected):
    assert model_parallelism("auto", 8, shares.__getitem__, 100) == expected
    assert model_parallelism("auto", 8, shares.__getitem__, None) == 1


def test_auto_refuses_a_model_whose_shares_do_not_fit():
    shares = {1: 200e9, 2: 110e9, 4: 70e9, 8: 90e9}
    with pytest.raises(RunError, match=r"weights take 200.0 GB, .* 8 devices at least 70.0 GB of the 100.0 GB"):
        model_parallelism("auto", 8, shares.__getitem__, int(100e9))
