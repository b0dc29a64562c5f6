"""What ``llama-hpc bench --device gpu`` does, from its options to measurements in a report and tables on the terminal."""

import argparse
import time

from llama_hpc.bench import device_attention, device_model, device_products
from llama_hpc.bench.cases import cases
from llama_hpc.bench.device_probes import DeviceProbes
from llama_hpc.bench.report import Report
from llama_hpc.bench.shapes import shape_config
from llama_hpc.bench.table import print_row
from llama_hpc.errors import UsageError
from llama_hpc.runtime.devices import choose, look, open_device, refusal

_KV_CACHES = ("f16",)


def open_gpu(report: Report):
    """The GPU that this process sees; its facts go to the report. Raises DeviceUnavailable."""
    (choice,) = choose([look("gpu")])
    if choice.kind != "gpu":
        raise refusal(choice)
    device = open_device(choice)
    probes = DeviceProbes(device)
    report.facts |= {"device": device.name, "architecture": device.architecture, "copy_bandwidth": probes.bandwidth(),
                     "multiply_add_peak": probes.peak(), "nominal_peak": probes.nominal_peak}
    print(f"{device.name}: copies {report.facts['copy_bandwidth'] / 1e9:.0f} GB/s, multiply-adds "
          f"{report.facts['multiply_add_peak'] / 1e12:.1f} Tflop/s, {probes.nominal_peak / 1e12:.1f} at the highest clock rate\n",
          flush=True)
    return device, probes


def measure_kernels(args: argparse.Namespace, report: Report) -> None:
    """``bench kernels --device gpu``: products of every format, shape and token count, then attention."""
    device, probes = open_gpu(report)
    print_row(device_products.TITLES)
    for columns, rows in args.shapes:
        rivals = {tokens: device_products.rivals_of(device, probes, columns, rows, tokens) for tokens in args.tokens}
        for weights in args.weights:
            bench = device_products.DeviceProducts(device, probes, weights, columns, rows)
            for tokens in args.tokens:
                _add(report, "device_products", bench.measure(tokens, args.rounds, rivals[tokens]))
    print()
    print_row(device_attention.TITLES)
    for heads in device_attention.SHAPES.values():
        for kv_cache in _KV_CACHES:
            for batch, tokens in device_attention.WORK:
                bench = device_attention.DeviceAttention(device, probes, kv_cache, heads, batch, device_attention.POSITIONS)
                _add(report, "device_attention", bench.measure(tokens, args.rounds))


def measure_models(args: argparse.Namespace, report: Report) -> None:
    """``bench model --device gpu``: random weights in a shape, every weight format and case."""
    if not args.shape:
        raise UsageError("bench model --device gpu times random weights; give --shape")
    config, timed = shape_config(args.shape, args.layers), cases(args.cases, args.tokens, args.prompt, args.batch)
    device, probes = open_gpu(report)
    for weights in args.weights or ["q3_5"]:
        start = time.perf_counter()
        held = device_model.random_weights(config, weights, device)
        bench = device_model.DeviceModel(args.shape, weights, config, held, device, probes, timed,
                                         None if args.kv_cache == "auto" else args.kv_cache)
        print(f"{args.shape}, {config.num_layers} layers, {weights}: {bench.nbytes / 1e6:.0f} MB of weights, ready after "
              f"{time.perf_counter() - start:.1f} s; KV cache in {bench.kv_cache}\n")
        print_row(device_model.TITLES)
        for case in timed:
            _add(report, "device_models", bench.measure(case, args.rounds))
        print()
        del held, bench


def _add(report: Report, kind: str, found) -> None:
    report.add(kind, found)
    print_row(found.as_row())
