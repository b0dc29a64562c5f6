"""The parts of measure.py that time kernels and models, and say whether targets are reached."""

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from overlapping import run, stage_of, steps_of

from llama_hpc.bench import device_attention, device_model, device_probes, device_products
from llama_hpc.bench.cases import Case
from llama_hpc.bench.device_attention import DeviceAttention
from llama_hpc.bench.device_model import DeviceModel, random_weights
from llama_hpc.bench.device_products import DeviceProducts, rivals_of
from llama_hpc.bench.shapes import shape_config
from llama_hpc.bench.table import print_row
from llama_hpc.kernels.cuda import random_weights as cuda_weights
from llama_hpc.model.config import ModelConfig, RopeConfig

ROUNDS = 3
ALL, ENDS = (1, 16, 64, 256, 1024), (1, 1024)
# Of Llama-3-70B and -8B: inputs, outputs, format, tokens.
PRODUCTS = [(*shape, weights, ALL if weights == "q3_5" else ENDS)
            for weights in ("q3_5", "q4", "q8") for shape in ((8192, 8192), (8192, 28672), (28672, 8192))]
PRODUCTS += [(*shape, "q3_5", ALL) for shape in ((4096, 4096), (4096, 14336), (14336, 4096))]
CASES = [Case("decode", 64), Case("prefill", 2048), Case("batch", 32, 64, 16)]
QUICK_MODEL = ModelConfig("llama", 64, 96, 1, 4, 2, 16, 128, 64, rope=RopeConfig(1e4))


def quickly() -> None:
    """Sizes for a test of the script."""
    device_probes.STEPS, device_probes.COPY_BYTES, device_probes.LEAST_SECONDS = 4, 1 << 16, 0
    cuda_weights.BANK_ROWS = 64


def probed(device, quick: bool) -> device_probes.DeviceProbes:
    """The limits of the device, which are printed."""
    if quick:
        quickly()
    probes = device_probes.DeviceProbes(device)
    print(f"copies: {probes.bandwidth() / 1e9:.0f} GB/s; multiply-adds of float32: {probes.peak() / 1e12:.1f} Tflop/s, "
          f"{probes.nominal_peak / 1e12:.1f} at the highest clock rate\n")
    return probes


def told(titles: Iterable[str], work: Iterable[Callable], over: Callable[[], bool]) -> bool:
    """A table of what each piece of work measures, then the targets. Work that there is no time for is counted."""
    print_row(titles)
    found, left = [], 0
    for measure in work:
        if over():
            left += 1
            continue
        found.append(measure())
        print_row(found[-1].as_row())
    print()
    for outcome in filter(None, map(device_probes.outcome, found)):
        print(outcome)
    if left:
        print(f"{left} left out for lack of time")
    return not left


def products(device, quick: bool, over: Callable[[], bool]) -> bool:
    """Products of one token and of many."""
    probes = probed(device, quick)
    work, rivals = [(64, 80, "q3_5", (1, 3))] if quick else PRODUCTS, {}

    def measures():
        for columns, rows, weights, tokens in work:
            bench = None
            for count in tokens:
                def measure(count=count, shape=(columns, rows), weights=weights):
                    nonlocal bench
                    bench = bench or DeviceProducts(device, probes, weights, *shape)
                    if (*shape, count) not in rivals:
                        rivals[*shape, count] = rivals_of(device, probes, *shape, count)
                    return bench.measure(count, ROUNDS, rivals[*shape, count])
                yield measure
    done = told(device_products.TITLES, measures(), over)
    if not any(rival.get("bf16") for rival in rivals.values()):
        print("NOT COMPARED: many tokens with cuBLAS, which CuPy does not find")
    return done


def attention(device, quick: bool, over: Callable[[], bool]) -> bool:
    """Attention of one token and of a prompt."""
    probes = probed(device, quick)
    shapes = [(2, 1, 16)] if quick else device_attention.SHAPES.values()
    positions, work = (40, [(1, 1), (1, 20)]) if quick else (device_attention.POSITIONS, device_attention.WORK)
    measures = (lambda heads=heads, batch=batch, tokens=tokens:
                DeviceAttention(device, probes, "f16", heads, batch, positions).measure(tokens, ROUNDS)
                for heads in shapes for batch, tokens in work)
    return told(device_attention.TITLES, measures, over)


def model(device, quick: bool, over: Callable[[], bool]) -> bool:
    """A model in the shape of Llama-3-8B: one sequence, a prompt, a batch of 64."""
    probes = probed(device, quick)
    config = QUICK_MODEL if quick else shape_config("llama3-8b", None)
    timed = [Case("decode", 3), Case("prefill", 5)] if quick else CASES
    bench = DeviceModel("quick" if quick else "llama3-8b", "q3_5", config, random_weights(config, "q3_5", device), device, probes,
                        timed)
    print(f"{bench.nbytes / 1e6:.0f} MB of weights\n")
    done = told(device_model.TITLES, [lambda case=case: bench.measure(case, ROUNDS) for case in timed], over)
    print(f"{bench.stage.replayed_steps} steps were replayed as graphs")
    return done


def overlap(device, quick: bool, over: Callable[[], bool]) -> bool:
    """A middle stage of a pipeline: steps one by one, and each launched before the one before is finished."""
    config = replace(QUICK_MODEL if quick else shape_config("llama3-8b", None), num_layers=1 if quick else 8, context_length=64)
    for rows in (2,) if quick else (16, 64, 512):
        stage, count = stage_of(device, config, (False, False), "q3_5", 2 * rows, rows), 2 if quick else 8
        steps = list(steps_of(config, 2, rows, count))
        run(stage, steps, 1)        # records what is replayed
        best = [float("inf")] * 2
        for _ in range(ROUNDS):
            for ahead in (0, 1):
                start = time.perf_counter()
                run(stage, steps, ahead)
                best[ahead] = min(best[ahead], (time.perf_counter() - start) / len(steps))
        print(f"{config.num_layers} layers, {rows} rows: {1e6 * best[0]:.0f} us a step one by one, {1e6 * best[1]:.0f} us beside "
              f"each other, {best[0] / best[1]:.2f} x")
        if over():
            return False
    return True


PARTS = {"product-speed": products, "attention-speed": attention, "model-speed": model, "overlap-speed": overlap}
