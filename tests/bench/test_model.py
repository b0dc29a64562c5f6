"""``llama-hpc bench model``: random weights in a shape, figures that add up, llama.cpp in alternation (stand-ins)."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from model_shapes import SHAPES as SMALL_SHAPES

from llama_hpc.bench import commands, products
from llama_hpc.bench.cases import cases
from llama_hpc.bench.model import ModelBenchmark
from llama_hpc.bench.peer import TOOLS, Peer, peer_models, random_gguf
from llama_hpc.bench.shapes import SHAPES, shape_config
from llama_hpc.cli.main import main
from llama_hpc.errors import NumericsError
from llama_hpc.kernels.cpu.calls import shared_pool
from llama_hpc.kernels.cpu.random_weights import RandomWeights
from llama_hpc.model.kv_cache import DTYPES
from llama_hpc.model.random_weights import random_stage
from llama_hpc.model.sizes import parameters, weight_bytes, whole

TINY = replace(SMALL_SHAPES["stories260K"], num_layers=3, norm_eps=2**-17)
# Numbers of parameters that the model cards and Hugging Face state.
PARAMETERS = {
    "smollm2-135m": 134_515_008, "tinyllama": 1_100_048_384, "llama3.2-1b": 1_235_814_400, "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096, "qwen2-0.5b": 494_032_768, "qwen2-7b": 7_615_616_512, "qwen3-8b": 8_190_735_360,
}
# Answers with a rate that its arguments decide, and notes them: decode and prefill of llama-bench, the batch of the other.
BENCH = 'echo "bench $(basename "$2") $4 $6 $8" >> {log}; echo "[{{\\"avg_ts\\": $4}}]"'
BATCHED = 'echo "batched $(basename "$2") $*" >> {log}; echo \'{{"speed_tg": 0.5}}\''
QUANTIZE = 'for last; do kind=$last; done; while [ "${{1#--}}" != "$1" ]; do shift; done; echo "$kind" > "$2"'


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in (("PROBE_BYTES", 1 << 16), ("PROBE_SECONDS", 1e-4)):
        monkeypatch.setattr(products, name, value)
    monkeypatch.setitem(SHAPES, "tiny", TINY)


@pytest.fixture
def build(tmp_path):
    """A build folder of stand-ins that write what they were asked into tmp_path/log."""
    for tool, script in zip(TOOLS, (BENCH, BATCHED, QUANTIZE), strict=True):
        path = tmp_path / "build" / tool
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script.format(log=tmp_path / 'log')}\n")
        path.chmod(0o755)
    return tmp_path / "build"


def bench(tmp_path, capsys, *options):
    output = tmp_path / "bench"
    arguments = ["--tokens", "4", "--prompt", "300", "--batch", "3", "--output", str(output)]
    assert main(["bench", "model", *map(str, options), *arguments]) == 0
    return capsys.readouterr().out.splitlines(), json.loads(output.with_suffix(".json").read_text())


def test_every_format_and_thread_count(tmp_path, capsys):
    formats = ["q3_5", "q4", "q8", "f16", "f32"]
    lines, report = bench(tmp_path, capsys, "--shape", "tiny", "--layers", "2", "--weights", *formats, "--threads", "1", "2",
                          "--rounds", "1")
    found = report["models"]
    assert [(r["weights"], r["threads"], r["case"]) for r in found] == [
        (name, threads, case) for name in formats for threads in (1, 2) for case in ("decode 4", "prefill 300", "batch 3x32")]
    assert sum(line.startswith("tiny, 2 layers") for line in lines) == len(formats)
    config = shape_config("tiny", 2)
    for result in found:
        tokens = {"decode 4": 4, "prefill 300": 300, "batch 3x32": 96}[result["case"]]
        assert result["tokens_per_second"] * result["seconds"] == pytest.approx(tokens)
        held = weight_bytes(config, result["weights"], *whole(config))
        assert held < result["weight_bytes"] < held + 2000
        if result["case"] == "decode 4":
            # Every weight once a token.
            assert result["gigabytes_per_second"] * 1e9 * result["seconds"] == pytest.approx(4 * held)
            matrices = parameters(config) - 5 * config.hidden_size
            assert result["operations_per_second"] * result["seconds"] == pytest.approx(4 * 2 * matrices)
    with h5py.File(tmp_path / "bench.h5") as file:
        assert file["models"]["tokens_per_second"].tolist() == [r["tokens_per_second"] for r in found]


@pytest.mark.parametrize(("kv_cache", "weights", "expected"), [
    ("auto", "q8", "f16"), ("auto", "f32", "f32"), ("q8", "f32", "q8")])
def test_format_of_the_cache(tmp_path, capsys, monkeypatch, kv_cache, weights, expected):
    kept = []
    seconds = ModelBenchmark.seconds
    monkeypatch.setattr(ModelBenchmark, "seconds", lambda self, case: kept.append(self.stage.cache) or seconds(self, case))
    lines, report = bench(tmp_path, capsys, "--shape", "tiny", "--cases", "decode", "--threads", "1", "--rounds", "1",
                          "--weights", weights, "--kv-cache", kv_cache)
    assert {cache.dtype for cache in kept} == {np.dtype(DTYPES[expected])}
    assert any(line.endswith(f"KV cache in {expected}") for line in lines)
    # Keys of 8 values and values, padded to the registers' 16, of 4 KV heads in 3 layers.
    (found,) = report["models"]
    bytes_of_values = {"f32": 24 * 4, "f16": 24 * 2, "q8": 24 + 2 * 2}[expected]
    assert found["kv_cache"] == expected and found["cache_bytes"] == 4 * 4 * 3 * bytes_of_values


def test_checkpoint(tmp_path, capsys):
    model = random_gguf(TINY, "random", tmp_path)
    lines, report = bench(tmp_path, capsys, model, "--cases", "decode", "--threads", "1", "--rounds", "2")
    assert any("3 layers, q3_5" in line for line in lines)
    assert [(r["model"], r["case"]) for r in report["models"]] == [(str(model), "decode 4")]


@pytest.mark.parametrize("source", ["shape", "file"])
def test_peer_in_alternation(tmp_path, capsys, build, source, monkeypatch):
    if source == "shape":
        model, kept = ["--shape", "tiny"], ["--peer-models", tmp_path / "kept"]
    else:
        model, kept = [random_gguf(TINY, "tiny", tmp_path)], []
    ours = []
    seconds = ModelBenchmark.seconds
    def noted(self, case):
        with open(tmp_path / "log", "a") as log:
            log.write(f"ours {case}\n")
        ours.append(seconds(self, case))
        return ours[-1]
    monkeypatch.setattr(ModelBenchmark, "seconds", noted)
    lines, report = bench(tmp_path, capsys, *model, "--threads", "2", "--rounds", "2", "--peer", build,
                          "--peer-formats", "Q4_0", "Q4_0-pure", *kept)
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert [line[0] for line in log] == ["ours", "bench"] * 8 + ["ours", "batched"] * 4
    # llama-bench with 2 threads: 4 tokens of decode, then 300 of a prompt.
    assert [line[2:] for line in log if line[0] == "bench"] == [["2", "0", "4"]] * 4 + [["2", "300", "0"]] * 4
    assert "-c 144 -npp 16 -ntg 32 -npl 3 -t 2 -tb 2" in " ".join(log[-1])
    kinds = ["-Q4_0.gguf" if i % 2 == 0 else "-Q4_0-pure.gguf" for i in range(12)]
    assert [line[1][-len(kind):] for line, kind in zip(log[1::2], kinds, strict=True)] == kinds
    ratios = report["ratios"]
    assert [(r["case"], r["peer_format"], r["peer_bytes"]) for r in ratios] == [
        (case, name, 5) for case in ("decode 4", "prefill 300", "batch 3x32") for name in ("Q4_0", "Q4_0-pure")]
    # The stand-in says 2 tokens a second on 2 threads; rounds 1 and 2 of the first format are our runs 0 and 2.
    assert ratios[0]["lowest"] == pytest.approx(4 / max(ours[0], ours[2]) / 2)
    assert ratios[0]["highest"] == pytest.approx(4 / min(ours[0], ours[2]) / 2)
    assert ratios[0]["ratio"] == pytest.approx(2 / ours[0] / 2 + 2 / ours[2] / 2)
    assert any(line.startswith("batch 3x32, threads 2: ") for line in lines)
    assert len(list((tmp_path / "kept").glob("*.gguf"))) == 3 if source == "shape" else True


def test_models_of_the_peer_are_deleted(tmp_path, capsys, build, monkeypatch):
    monkeypatch.setattr(commands.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    bench(tmp_path, capsys, "--shape", "tiny", "--cases", "decode", "--threads", "1", "--rounds", "1", "--peer", build)
    assert not list((tmp_path / "temporary").iterdir())


def test_peer_has_its_own_environment(build, tmp_path):
    (build / "llama-bench").write_text('#!/bin/sh\necho "[{\\"avg_ts\\": $SPEED}]"\n')
    peer = Peer(build, environment={"SPEED": "7.5"})
    assert peer.decode("model", 1, 1) == 7.5
    (tmp_path / "model.gguf").write_text("x")
    assert peer_models(peer, tmp_path / "model.gguf", ["Q4_0-pure"], tmp_path)[0].path.read_text() == "Q4_0\n"


def test_pure_models_are_asked_for(tmp_path, build):
    (build / "llama-quantize").write_text('#!/bin/sh\nfor last; do :; done; echo "$*" > "$4"\n')
    (tmp_path / "model.gguf").write_text("x")
    found = Peer(build).quantised(tmp_path / "model.gguf", "Q4_0", tmp_path, pure=True)
    assert found.read_text().startswith("--allow-requantize --pure ") and found.name.endswith("-Q4_0-pure.gguf")


def test_a_fault_is_not_timed():
    weights = random_stage(TINY, "q4", *whole(TINY), RandomWeights())
    weights.layers[1].mlp.up.weights.row_scales[:] = 1e30
    (case,) = cases(["decode"], 4, 8, 2)
    with pytest.raises(NumericsError, match="layer 1, up"):
        ModelBenchmark("tiny", "q4", TINY, weights, shared_pool(2), [case]).seconds(case)


def test_steps_of_a_case():
    decode, prefill, batch = cases(["decode", "prefill", "batch"], 3, 600, 5)
    assert list(decode.steps()) == [(range(0, 1), 1), (range(1, 2), 1), (range(2, 3), 1)]
    assert list(prefill.steps()) == [(range(0, 256), 0), (range(256, 512), 0), (range(512, 600), 1)]
    assert list(batch.steps())[::31] == [(range(16, 17), 5), (range(47, 48), 5)]


def test_shapes_are_those_of_the_models():
    assert {name: parameters(config) for name, config in SHAPES.items() if name != "tiny"} == PARAMETERS
    assert np.array_equal(shape_config("mistral-7b", 3).windows, [4096] * 3)


@pytest.mark.parametrize("name", ["qwen2-0.5b", "qwen3-8b"])
def test_biases_and_head_norms(name):
    config = replace(shape_config(name, 1), hidden_size=64, intermediate_size=96, num_heads=4, kv_heads=2, head_dim=16,
                     vocab_size=64)
    (case,) = cases(["prefill"], 4, 8, 2)
    weights = random_stage(config, "q3_5", *whole(config), RandomWeights())
    assert ModelBenchmark(name, "q3_5", config, weights, shared_pool(1), [case]).seconds(case) > 0
    assert weights.layers[0].attention.q.bias.size == (64 if config.attention_bias else 0)
    assert (weights.layers[0].attention.q_norm is not None) == config.qk_norm
