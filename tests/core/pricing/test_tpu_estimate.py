"""The laboratory on the real step and compiler, and that the estimates do not fall. All of them: `make test-tpu`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import tpu_estimate
from benchmarks.common.shapes import Case
from benchmarks.tpu_estimate import CASES, estimate
from core.base.errors import RunError, UsageError
from core.pricing.tpu_estimate import estimate_run
from core.pricing.tpu_programs import tpu_devices
from core.run.config import RunConfig
from core.step.layout import default_row_lengths

ROOT = Path(__file__).parents[3]
BASELINES = json.loads(Path(__file__).with_name("tpu_baselines.json").read_text())
FALL = 0.01
has_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install -e '.[lab]'"
)
all_cases = pytest.mark.skipif(os.environ.get("TPU_LAB") != "all", reason="minutes of compilation: make test-tpu")


def assert_not_slower(found, name):
    assert found.mfu >= (1 - FALL) * BASELINES[name], f"{name}: {found.mfu:.3f} was {BASELINES[name]}"


@has_compiler
def test_one_layer_adds_up_and_is_no_slower_than_it_was():
    found = estimate(Case("Qwen2.5-0.5B", (0,), 512), "v5e:2x2")
    assert_not_slower(found, "fast")
    assert (found.chips, found.model_parallel, found.kernels, found.collectives) == (4, 1, 1, ())
    tokens, d, f, kv, heads, length = 8192, 896, 4864, 128, 14, 512
    matrices = 2 * d * d + 2 * d * kv + 3 * d * f
    attention = 16 * 4 * length * (length + 1) / 2 * heads * 64
    assert found.model_flops == 2 * matrices * tokens + attention
    # One block of 512 x 512 for each head and row, at 0.4 of 197 TFLOP/s.
    assert found.kernel_seconds == pytest.approx(16 * heads * 4 * 512 * 512 * 64 / (0.4 * 197e12))
    assert found.hbm_bytes > (151936 * d + matrices) * 2 + tokens * d * 2
    as_json = json.loads(json.dumps(found.to_json()))
    assert as_json["estimated_mfu"] == pytest.approx(found.model_flops / 197e12 / found.step_seconds, abs=1e-4)
    assert as_json["tokens_per_second_per_chip"] == pytest.approx(8192 / as_json["estimated_step_seconds"], rel=1e-4)
    assert {"hbm_bytes", "collectives"} <= set(as_json)


@has_compiler
@all_cases
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_estimate_falls_and_replicated_models_exchange_nothing(case):
    found = estimate(case, "v5e:8x8")
    assert_not_slower(found, case.name)
    assert case.target is None or found.mfu >= case.target
    assert found.hbm_bytes < found.hbm_capacity
    if found.model_parallel == 1:
        assert found.collectives == ()


@has_compiler
def test_what_does_not_fit_is_one_line_with_the_bytes():
    with pytest.raises(RunError, match=r"the step does not fit: it needs 28\.\d+GiB of a chip's 15\.\d+GiB: lower"):
        estimate(Case("Qwen2.5-7B", None, 2048, layout="1d", rows=32), "v5e:8x8")


@pytest.mark.parametrize("topology", ["v5e", "v5e:8", "v3:2x2", "v5e:8x8; rm", "v5e:8x"])
def test_a_malformed_topology_is_refused(topology):
    with pytest.raises(UsageError, match=r"must be a generation \(v5e, v5p, v6e\) and its shape, such as v5e:8x8"):
        tpu_devices(topology)


@pytest.mark.parametrize("topology", ["v5e:3x5", "v5e:100x100", "v6e:2x2x2", "v5p:4x4"])
def test_a_shape_that_no_slice_has_is_refused_before_the_compiler_sees_it(topology):
    generation = topology.partition(":")[0]
    with pytest.raises(UsageError, match=rf"--tpu_topology {topology}: slices of {generation} are \w+, 2x2"):
        tpu_devices(topology)


@has_compiler
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1"])
def test_a_slice_may_be_one_chip(topology):
    (chip,) = tpu_devices(topology)
    assert tuple(chip.coords) == (0, 0, 0)


def test_without_the_compiler_the_flag_says_what_to_install(tmp_path):
    """A module finder that knows no libtpu stands for a machine that has none."""
    program = (
        "import importlib.util, sys; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'libtpu' else find(name, *rest)\n"
        "import extract_activations; extract_activations.main()"
    )
    (tmp_path / "config.json").write_text(json.dumps(shape_fields()))
    flags = ["--model_path", str(tmp_path), "--plan", "--tpu_topology", "v5e:8x8"]
    done = subprocess.run(
        [sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --tpu_topology needs the TPU compiler")
    assert done.stderr.count("\n") == 1


def shape_fields():
    shapes = json.loads((ROOT / "benchmarks" / "common" / "model_shapes.json").read_text())
    return shapes["Qwen2.5-0.5B"]


@has_compiler
def test_a_run_is_estimated_from_its_flags_and_a_config_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shape_fields()))
    config = RunConfig(
        model_path=str(tmp_path),
        plan=True,
        tpu_topology="v5e:2x2",
        layers_to_extract=(0,),
        max_seq_length=300,
        batch_size=2,
    )
    found = estimate_run(config, "v5e:2x2")
    assert (found.rows, found.length) == (2, default_row_lengths(300)[-1])
    assert any(line.startswith("estimated step") for line in found.lines())


def run_of(tmp_path, **flags):
    """Of one layer of Qwen2.5-0.5B, four rows of 512 tokens, bfloat16."""
    (tmp_path / "config.json").write_text(json.dumps(shape_fields()))
    asked = {"layers_to_extract": (0,), "max_seq_length": 512, "batch_size": 4, "dtype": "bfloat16"} | flags
    config = RunConfig(model_path=str(tmp_path), plan=True, tpu_topology="v5e:1x1", **asked)
    return estimate_run(config, "v5e:1x1")


# Beside the arrays a token's peaks and a row's two losses leave, in float32.
TOKENS, WIDTH, PEAK, LOSSES = 4 * 512, 896, 4, 4 * 2 * 4


@has_compiler
def test_what_is_reduced_leaves_less_and_its_arithmetic_takes_time(tmp_path):
    found = run_of(tmp_path, quantize="int8", dtype="float16", exclude_tokens=("bos",), positions=("4:",))
    assert found.output_bytes_whole == TOKENS * (2 * WIDTH + PEAK)
    # A code of a byte for each value, a float32 scale for each 32 of them; the peaks of the forward pass too.
    assert found.output_bytes == TOKENS * (WIDTH + 4 * WIDTH // 32 + 2 * PEAK) + LOSSES
    assert found.output_rate == found.output_bytes / found.step_seconds
    assert any(name.startswith("reduction: ") for name in found.operations)
    assert found.not_counted == ("--exclude_tokens", "--positions")
    lines = "\n".join(found.lines())
    assert "reduction        quantize int8 (blocks of 32)\n" in lines
    assert "not counted      --exclude_tokens, --positions: the data decides" in lines


@has_compiler
def test_of_a_sample_that_is_pooled_one_row_leaves(tmp_path):
    found = run_of(tmp_path, pool=("last",))
    assert found.output_bytes == 4 * (2 * WIDTH + PEAK) + LOSSES + TOKENS * PEAK
    assert json.loads(json.dumps(found.to_json()))["reduction"] == "pool last"


def test_flags_of_a_reduction_are_checked_against_the_model(tmp_path):
    with pytest.raises(UsageError, match=r"--project \S+nope.npy: there is no such file"):
        run_of(tmp_path, project=str(tmp_path / "nope.npy"))
    with pytest.raises(UsageError, match="--topk 5000: residual is only 896 wide"):
        run_of(tmp_path, topk=5000)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"certify": 3}, "--certify 3: leave it out with --tpu_topology"),
        ({"multihost": True}, "--multihost: leave it out with --tpu_topology"),
    ],
)
def test_flags_that_mean_nothing_for_an_estimate_are_refused(flags, reason):
    with pytest.raises(UsageError, match=reason):
        RunConfig(plan=True, tpu_topology="v5e:8x8", **flags)


@has_compiler
@pytest.mark.parametrize(("layout", "links"), [("2x2", 1), ("1x4", 2)])
def test_what_chips_exchange_takes_the_links_between_them(layout, links):
    """Two sums of a layer, and one of the embedding, of which each chip of Qwen2.5-7B's four kv heads has a part."""
    found = estimate(Case("Qwen2.5-7B", (0,), 512, layout=layout, rows=2), "v5e:2x2")
    n = found.model_parallel
    assert {(c.operation, len(c.group)) for c in found.collectives} == {("all-reduce", n)}
    sums = sum(c.times for c in found.collectives)
    sent = sums * 2 * 512 * 3584 * 2 * 2 * (n - 1) / n
    assert found.collective_seconds == pytest.approx(sent / (links * 50e9))


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model", "Qwen2.5-0.5B", "--layers", "50"], "--layers 50: Qwen2.5-0.5B has layers 0 to 23"),
        (["--layers", "3"], "--layers needs --model"),
        (["--row_length", "512"], "--row_length needs --model"),
        (["--model", "SHORT"], "--row_length 2048: .* knows 1024 positions: pass --row_length 1024 or less"),
        (["--model", "SHORT", "--row_length", "100"], "--row_length 100: must be a multiple of 128"),
    ],
)
def test_the_benchmark_refuses_what_its_model_does_not_have(tmp_path, flags, reason):
    (tmp_path / "config.json").write_text(json.dumps(shape_fields() | {"max_position_embeddings": 1024}))
    argv = [str(tmp_path) if flag == "SHORT" else flag for flag in flags]
    with pytest.raises(UsageError, match=reason):
        tpu_estimate.run(tpu_estimate.build_parser().parse_args(argv))


def test_the_flag_needs_plan():
    with pytest.raises(UsageError, match="--tpu_topology v5e:8x8: needs --plan"):
        RunConfig(tpu_topology="v5e:8x8")
