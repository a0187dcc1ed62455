"""benchmarks/gpu/benchmark.py rehearsed on this machine: every line of it runs, and its numbers add up."""

import importlib.util
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.common.measuring import Ratio
from benchmarks.gpu import attention as gpu_attention
from benchmarks.gpu import benchmark as gpu
from benchmarks.gpu import compilation as gpu_compile
from benchmarks.gpu import devices as gpu_devices
from benchmarks.gpu import step as gpu_step
from benchmarks.gpu.devices import peak_tflops
from benchmarks.gpu.step import UniformBatch
from core.base.errors import RunError, UsageError
from core.step.backend import StepOutput
from qwen2_jax.attention.gpu_tiles import candidates

TINY = ["--rehearse", "--steps", "2", "--repeats", "2"]
D, FF, HEADS, KV, HEAD = 64, 96, 4, 2, 16
MATRICES = 2 * D * HEADS * HEAD + 2 * D * KV * HEAD + 3 * D * FF
has_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def settings(*flags):
    return gpu.settings_of(gpu.build_parser().parse_args([*TINY, *flags]))


def measured(model, length, *flags):
    case = next(case for case in gpu.CASES if (case.model, case.length) == (model, length))
    return gpu.measure(case, settings(*flags))


@pytest.mark.benchmark
def test_ours_alone_adds_up():
    found = measured("Qwen2.5-0.5B", 512, "--peers", "--samples_per_row", "2", "--peak_tflops", "0.5")
    ours = found.ours
    assert found.workload == UniformBatch(4, 128, 2)
    seen = 8 * 64 * 65 / 2
    assert found.model_flops == 3 * (2 * MATRICES * 512 + 4 * seen * HEADS * HEAD)
    assert found.copied_bytes == 3 * 512 * D * 2
    assert found.host_bytes_per_second > 0
    assert ours.step_seconds == pytest.approx(np.median(found.timings["ours"].wall) / 2)
    assert ours.copied_step_seconds == pytest.approx(np.median(found.timings["ours, copied"].wall) / 2)
    assert ours.mfu == pytest.approx(found.model_flops / ours.step_seconds / 0.5e12)
    assert ours.tokens_per_second == pytest.approx(512 / ours.step_seconds)
    assert ours.copied_tokens_per_second == pytest.approx(512 / ours.copied_step_seconds)
    assert ours.copy_share == pytest.approx(max(0, 1 - ours.step_seconds / ours.copied_step_seconds))
    assert ours.disagreement == 0
    assert found.peers == []


@has_torch
@pytest.mark.benchmark
@pytest.mark.parametrize(
    ("model", "attention", "length", "samples"),
    [("gemma-2-2b", "eager", 512, "4"), ("Qwen2.5-0.5B", "sdpa", 512, "1")],
)
def test_transformers_computes_the_same_from_the_same_weights(model, attention, length, samples):
    found = measured(model, length, "--peers", "own", "--samples_per_row", samples)
    (peer,), ours = found.peers, found.ours
    assert peer.side == f"own ({attention})"
    assert 0 < peer.disagreement < 2e-2
    assert peer.ratio.median == pytest.approx(peer.step_seconds / ours.step_seconds, rel=1e-3)
    assert peer.ratio_copied.median == pytest.approx(peer.copied_step_seconds / ours.copied_step_seconds, rel=1e-3)


@pytest.mark.benchmark
def test_a_layer_that_is_off_stops_the_benchmark_however_small_it_is():
    ours = np.ones((2, 1, 4, 8), np.float32)
    ours[1] *= 100
    theirs = ours.reshape(2, 2, 2, 8).copy()
    theirs[0] += 0.04
    assert gpu._checked_distance("own", theirs, ours) == pytest.approx(0.04)
    theirs[0] += 0.04
    with pytest.raises(RunError, match=r"^the activations differ from those of own by 8\.00e-02, more than 0\.05$"):
        gpu._checked_distance("own", theirs, ours)
    with pytest.raises(RunError, match="by nan"):
        gpu._checked_distance("own", theirs * np.nan, ours)


@pytest.mark.benchmark
def test_the_tiles_that_are_told_are_those_of_the_step(monkeypatch):
    seen = []
    monkeypatch.setattr(gpu, "kernel_tiles", lambda *given: seen.append(given))
    config = gpu.decoder_config(settings().fields(gpu.CASES[-1]))
    assert gpu._tiles(config, UniformBatch(2, 256, 1)) is None
    ((q, softcap),) = seen
    assert (q.shape, q.dtype, softcap) == ((2, 256, KV, HEADS // KV, HEAD), "bfloat16", 50.0)


@has_torch
@pytest.mark.benchmark
def test_a_peer_that_fails_is_left_out_with_a_line(capsys, monkeypatch):
    from benchmarks.gpu import transformers_side as gpu_transformers

    def fail(*_, **__):
        raise RuntimeError("Python.h: No such file\n or directory")

    monkeypatch.setattr(gpu_transformers.torch, "compile", fail)
    assert measured("Qwen2.5-7B", 512, "--peers", "own_compiled").peers == []
    failed = "own_compiled (sdpa) is left out: RuntimeError: Python.h: No such file or directory\n"
    assert capsys.readouterr().err == failed


@pytest.mark.benchmark
def test_the_command_prints_every_case_of_a_model_with_its_verdict(capsys):
    flags = [*TINY, "--models", "Qwen2.5-7B", "--peers", "--peak_tflops", "1e-9"]
    gpu.run(gpu.build_parser().parse_args(flags))
    told = capsys.readouterr()
    assert told.err == "a rehearsal: tiny models; the peak and the targets mean nothing\n"
    lines = told.out.splitlines()[3:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| Qwen2.5-7B, layer 13, rows of 512 ",
        "| Qwen2.5-7B, layer 13, rows of 2048",
    ]
    assert all(">= 0.60: yes" in line and "all logits" in line for line in lines)


@pytest.mark.benchmark
def test_json_holds_settings_and_cases(capsys, monkeypatch):
    ours = gpu.SideResult("ours", *[1.0] * 6, Ratio(1, 1, 1, 1), Ratio(1, 1, 1, 1), 0.0)
    result = gpu.GpuResult("case", UniformBatch(1, 128, 1), None, None, 1.0, 1, 1.0, ours, [], {})
    monkeypatch.setattr(gpu, "measure", lambda case, settings: result)
    gpu.run(gpu.build_parser().parse_args([*TINY, "--peers", "--json"]))
    found = json.loads(capsys.readouterr().out)
    assert (found["settings"]["is_rehearsal"], found["settings"]["peak_tflops"]) == (True, 1.0)
    assert len(found["cases"]) == len(gpu.CASES)
    assert found["cases"][0]["ours"]["mfu"] == 1.0
    assert found["machine"]["cores"] >= 1


def test_samples_fill_their_rows_and_positions_restart():
    arrays = UniformBatch(3, 12, 4).arrays(50)
    assert arrays.positions.tolist() == [[0, 1, 2] * 4] * 3
    assert arrays.segment_ids.tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]] * 3
    assert 0 <= arrays.tokens.min() <= arrays.tokens.max() < 50
    np.testing.assert_array_equal(arrays.tokens, UniformBatch(3, 12, 4).arrays(50).tokens)


def test_without_a_gpu_one_line_says_what_to_do():
    with pytest.raises(
        RunError, match=r"^no GPU: JAX computes on the CPU here\. Run .*\[cuda\].* --rehearse$"
    ) as raised:
        gpu.run(gpu.build_parser().parse_args([]))
    assert raised.value.exit_code == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (AssertionError(), "no platform of JAX_PLATFORMS=cuda works; a plugin that failed says why above"),
        (RuntimeError("Unable to initialize 'cuda':\n no driver"), "Unable to initialize 'cuda': no driver"),
    ],
)
def test_a_jax_that_cannot_start_is_no_gpu_either(failure, reason, monkeypatch):
    def fail():
        raise failure

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(gpu_devices, "jax", SimpleNamespace(default_backend=fail))
    for is_rehearsal in (False, True):
        with pytest.raises(RunError, match=r"^no GPU: JAX cannot start: ") as raised:
            gpu_devices.require_gpu(is_rehearsal=is_rehearsal)
        assert f": {reason}. Run this on a machine" in str(raised.value)
        assert "\n" not in str(raised.value)


def attention_alone(*flags):
    gpu_attention.run(gpu_attention.build_parser().parse_args(["--repeats", "1", *flags]))


@pytest.mark.benchmark
def test_attention_alone_compares_every_way_that_runs(capsys):
    attention_alone("--rehearse", "--models", "Qwen2.5-0.5B", "--samples_per_row", "2", "--json")
    told = capsys.readouterr()
    assert told.err == "Qwen2.5-0.5B: cuDNN, samples as a mask: RuntimeError: cuDNN is not detected.\n"
    rows = {row["way"]: row for row in json.loads(told.out)["models"]["Qwen2.5-0.5B"]}
    assert set(rows) == {"all logits at once", "64 x 32, 4 warps, 2 stages"}
    flops = 4 * 2 * (64 * 65 / 2) * 64
    assert all(row["tflops"] == pytest.approx(flops / row["seconds"] / 1e12) for row in rows.values())
    assert rows["all logits at once"]["distance"] == 0
    assert 0 < rows["64 x 32, 4 warps, 2 stages"]["distance"] < 1e-2


@pytest.mark.benchmark
def test_attention_alone_lists_the_fastest_and_what_a_run_tries():
    found = [gpu_attention.Found(str(n), tiles, n, 1.0, 0.0) for n, tiles in enumerate(gpu_attention.GRID)]
    found.append(gpu_attention.Found("cuDNN", None, 99, 1.0, 0.0))
    listed = gpu_attention.report("Qwen2.5-7B", found).splitlines()[3:]
    named = {line.split()[1] for line in listed}
    tried = {str(gpu_attention.GRID.index(tiles)) for tiles in candidates(128)}
    assert named == {*map(str, range(8)), *tried, "cuDNN"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "^no GPU: JAX computes on the CPU here"),
        (["--rehearse", "--row_length", "200"], "--row_length 200: must be a multiple of 128, at most --tokens 16384"),
        (["--rehearse", "--samples_per_row", "3"], "--samples_per_row 3: must divide --row_length 2048"),
    ],
)
def test_attention_alone_refuses_in_one_line(flags, message):
    with pytest.raises(RunError, match=message):
        attention_alone(*flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the GPU's compiler is not installed: make"),
        (["--tokens", "100"], "--tokens 100: must be a multiple of 2048"),
    ],
)
def test_compiling_for_a_gpu_refuses_in_one_line(flags, message, monkeypatch):
    monkeypatch.setattr(gpu_compile, "has_compiler", lambda: False)
    with pytest.raises(UsageError, match=message):
        gpu_compile.run(gpu_compile.build_parser().parse_args(flags))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_peaks_go_by_the_name_of_the_gpu(kind, peak):
    assert peak_tflops(kind) == peak


@pytest.mark.parametrize("kind", ["NVIDIA GeForce RTX 4091", "Tesla T4", "NVIDIA L400"])
def test_an_unknown_gpu_asks_for_its_peak(kind):
    with pytest.raises(UsageError, match=f"^--peak_tflops: {kind} is not in benchmarks/gpu/devices.py: pass"):
        peak_tflops(kind)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples_per_row", "3"], "--samples_per_row 3: must be a power of two, at most 128"),
        (["--samples_per_row", "256"], "--samples_per_row 256: must be a power of two, at most 128"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        settings(*flags)


@pytest.mark.parametrize(
    "flags", [("--steps", "0"), ("--peak_tflops", "-1"), ("--peak_tflops", "nan"), ("--repeats", "0")]
)
def test_numbers_that_cannot_be_are_refused_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as raised:
        settings(*flags)
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: argument {flags[0]}: {flags[1]}: expected ")


def test_samples_are_counted_against_the_rows_that_are_used(monkeypatch):
    """512 tokens on a GPU, 128 in a rehearsal."""
    monkeypatch.setattr(gpu, "require_gpu", lambda is_rehearsal: "NVIDIA H200")
    flags = ["--peers", "--samples_per_row"]
    assert gpu.settings_of(gpu.build_parser().parse_args([*flags, "512"])).samples == 512
    with pytest.raises(UsageError, match="must be a power of two, at most 512"):
        gpu.settings_of(gpu.build_parser().parse_args([*flags, "1024"]))
    assert settings("--samples_per_row", "128").samples == 128


def test_what_is_not_installed_is_said_in_one_line(monkeypatch, capsys):
    installed = {"torch", "transformers"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object() if name in installed else None)
    assert gpu.runnable_peers(tuple(gpu.PEERS), is_rehearsal=True) == ("own", "own_compiled", "flex_compiled")
    assert capsys.readouterr().err == "flash attention is left out: flash_attn is not installed\n"
    installed.clear()
    assert gpu.runnable_peers(("own",), is_rehearsal=True) == ()
    assert capsys.readouterr().err == "transformers is left out: torch and transformers not installed\n"


@has_torch
def test_torch_without_cuda_is_no_peer_of_a_gpu(capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.runnable_peers(("own",), is_rehearsal=False) == ()
    assert capsys.readouterr().err == "transformers is left out: torch with CUDA not installed\n"


@pytest.mark.benchmark
def test_the_next_step_is_started_before_one_is_fetched(monkeypatch):
    events = []

    def noting(event):
        def note(output):
            number = output["number"] if isinstance(output, dict) else output.peaks["number"]
            events.append(f"{event} {number}")
            return output

        return note

    def step(arrays):
        number = len([event for event in events if event.startswith("step")])
        events.append(f"step {number}")
        return StepOutput({}, {"number": number})

    for function, event in (("begin_copies", "copy"), ("on_host", "fetch"), ("wait_for", "wait")):
        monkeypatch.setattr(gpu_step, function, noting(event))
    ours = gpu_step.OurSide(None, {}, None, step)
    ours.extract(3)
    assert events == ["step 0", "copy 0", "step 1", "copy 1", "fetch 0", "step 2", "copy 2", "fetch 1", "fetch 2"]
    events.clear()
    ours.copy()
    assert events == ["step 0", "wait 0", "copy 0", "fetch 0"], "what is timed is the copy of a step that is done"
    events.clear()
    ours.forward(2)
    assert events == ["step 0", "step 1", "wait 0", "wait 1"]
