"""Peak memory of every rank of a run: anonymous and shared pages, sampled from /proc while it runs. Linux.

As a program: ``python tests/mpi/memory.py`` writes a random float32 checkpoint of TinyLlama's size (4.1 GiB) to a
temporary folder, runs it on 1, 2 and 4 ranks and compares each rank's peak with 1.3 x its share of the weights + 350 MB.
"""

import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mpi_jobs import mpirun
from reference_models import write_random_llama

from llama_hpc.engine.layout import rank_shares
from llama_hpc.grid import GridShape
from llama_hpc.weights.checkpoint import open_checkpoint

ALLOWED_BEYOND, ALLOWED_FACTOR = 350_000_000, 1.3
TINYLLAMA = {"hidden": 2048, "ffn": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocab": 32000}


class Sampler(threading.Thread):
    """Follows the ranks that have ``marker`` on their command line; ``peaks`` maps rank to bytes."""

    def __init__(self, marker: str):
        super().__init__(daemon=True)
        self.marker, self.peaks, self._stop_asked = marker, {}, threading.Event()

    def run(self):
        while not self._stop_asked.is_set():
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    if self.marker not in (folder / "cmdline").read_text():
                        continue
                    variables = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
                    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
                except (OSError, ValueError):
                    continue
                rank = variables.get("OMPI_COMM_WORLD_RANK", variables.get("PMI_RANK"))
                if rank is None or "RssAnon" not in status:
                    continue
                used = sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
                self.peaks[int(rank)] = max(self.peaks.get(int(rank), 0), used)
            time.sleep(0.01)

    def stop(self):
        self._stop_asked.set()
        self.join()


def measure(folder: Path, grid: str, weights: str, work: Path) -> list[tuple[int, int, int]]:
    """(share of the weights, peak, allowed) in bytes for every rank of a short run on ``grid``."""
    prompts, output = work / "prompts.jsonl", work / f"memory-{os.getpid()}-{grid}.h5"
    prompts.write_text('{"token_ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n{"token_ids": [9, 10, 11]}\n')
    shape = GridShape.parse(grid)
    sampler = Sampler(str(output))
    sampler.start()
    job = mpirun(shape.size, ["-m", "llama_hpc", "run", folder, "--prompts", prompts, "--output", output, "--grid", grid,
                               "--weights", weights, "--max-tokens", 4], timeout=300)
    sampler.stop()
    assert job.returncode == 0, f"exit code {job.returncode}\n{job.stdout}{job.stderr}"
    shares = [rank.weights for rank in rank_shares(open_checkpoint(folder).config, weights, shape, 0)]
    return [(share, sampler.peaks[rank], int(ALLOWED_FACTOR * share) + ALLOWED_BEYOND) for rank, share in enumerate(shares)]


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_random_llama(model, **TINYLLAMA)
        for grid in ("1x1x1", "1x1x2", "1x2x1", "1x1x4", "1x2x2"):
            for rank, (share, peak, allowed) in enumerate(measure(model, grid, "f32", Path(folder))):
                failed += peak > allowed
                print(f"grid {grid} rank {rank}: share {share / 1e6:7.1f} MB, peak {peak / 1e6:7.1f} MB, "
                      f"allowed {allowed / 1e6:7.1f} MB {'ok' if peak <= allowed else 'TOO MUCH'}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
