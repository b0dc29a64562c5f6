"""A model on one device without MPI, Numba and HDF5: greedy answers, whose digest is that of ``llama-hpc run``.

    python tests/cuda/standalone.py MODEL --weights q8 [--prompts FILE] [--max-tokens N] [--emulated]

Weights are quantised by the plain reference. Prints the digest. Nothing that it imports imports what may be absent.
"""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from llama_hpc.kernels import reference_quantize
from llama_hpc.kernels.codebook import fit_codebook, sample_rows
from llama_hpc.kernels.formats import Blocks
from llama_hpc.kernels.numerics import log_probability
from llama_hpc.kernels.sampling import logit_of, token_of
from llama_hpc.model.device_stage import DeviceStage
from llama_hpc.model.whole_model import assemble, whole_stage
from llama_hpc.results.digest import digest
from llama_hpc.results.schema import Output
from llama_hpc.weights.checkpoint import open_checkpoint
from llama_hpc.weights.places import DevicePlaces

PROMPTS = Path(__file__).with_name("prompts.jsonl")


class Loader:
    """Whole tensors of a checkpoint on a device, quantised by the reference."""

    def __init__(self, checkpoint, weights_format: str, device):
        self.checkpoint, self.config, self.format = checkpoint, checkpoint.config, weights_format
        self._places = DevicePlaces(device)

    def stage(self) -> SimpleNamespace:
        """What ``model.transformer.StageWeights`` has."""
        return assemble(self.config, self.format, self.matrix, self.checkpoint.read)

    def matrix(self, name: str, block: int, weights_format: str):
        """One matrix as products take it."""
        values = self.checkpoint.read(name)
        blocks = Blocks(values.shape[1], block)
        place = self._places.one(weights_format, len(values), blocks, None)
        self._places.fill(place, 0, self._quantized(values, blocks, weights_format))
        return self._places.complete(place)

    def _quantized(self, values: np.ndarray, blocks: Blocks, weights_format: str):
        if weights_format == "q3_5":
            sample = values[sample_rows(*values.shape)]
            codebook = fit_codebook(sample, blocks, cell_sums=reference_quantize.cell_sums)
            return reference_quantize.quantize_q3_5(values, blocks, codebook, reference_quantize.row_maxima(values))
        if weights_format in ("q8", "q4"):
            return {"q8": reference_quantize.quantize_q8, "q4": reference_quantize.quantize_q4}[weights_format](values, blocks)
        return reference_quantize.quantize_f16(values) if weights_format == "f16" else values


def make_stage(model: str, weights_format: str, device, sequences: int, max_seq_len: int, max_rows: int) -> DeviceStage:
    """The whole of a model on a device."""
    checkpoint = open_checkpoint(model)
    return whole_stage(checkpoint.config, Loader(checkpoint, weights_format, device).stage(), device, sequences=sequences,
                       max_seq_len=max_seq_len, max_rows=max_rows)


def answer(stage: DeviceStage, prompts: list[list[int]], count: int) -> list[Output]:
    """Greedy answers of ``count`` tokens to all prompts at once, which are prefilled one after the other."""
    outputs = [Output(i, 0, [], [], "", "length") for i in range(len(prompts))]

    def run(tokens, sequences, positions, wanted) -> None:
        arrays = (np.array(values, np.int32) for values in (tokens, sequences, positions))
        stage.forward(SimpleNamespace(rows=len(tokens), **dict(zip(("tokens", "sequences", "positions"), arrays, strict=True)),
                                      outputs=np.array(wanted)))
        if stage.faults.code:
            raise SystemExit(f"fault {stage.faults.code:#x}")
        best = stage.best[: len(wanted)].max(axis=1)
        totals = stage.totals[: len(wanted)].sum(axis=1)
        for i, row in enumerate(wanted):
            output = outputs[sequences[row]]
            output.tokens.append(int(token_of(best[i])))
            output.logprobs.append(log_probability(logit_of(best[i : i + 1])[0], logit_of(best[i : i + 1])[0], int(totals[i])))
    for i, prompt in enumerate(prompts):
        run(prompt, [i] * len(prompt), range(len(prompt)), [len(prompt) - 1])
    numbers = list(range(len(prompts)))
    for step in range(count - 1):
        run([outputs[i].tokens[-1] for i in numbers], numbers, [len(prompts[i]) + step for i in numbers], numbers)
    for output in outputs:
        output.tokens, output.logprobs = np.array(output.tokens, np.int32), np.array(output.logprobs, np.float32)
    return outputs


def read_prompts(path: Path) -> tuple[list[str], list[list[int]]]:
    """Ids and tokens of the prompts of a file."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["id"] for line in lines], [line["token_ids"] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--weights", default="q8")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="lines with id and token_ids")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--emulated", action="store_true", help="without a GPU")
    options = parser.parse_args()
    ids, prompts = read_prompts(options.prompts)
    if options.emulated:
        from emulated_device import EmulatedDevice
        device = EmulatedDevice()
    else:
        from llama_hpc.kernels.cuda.device import Device
        device = Device()
    longest = max(map(len, prompts))
    stage = make_stage(options.model, options.weights, device, len(prompts), longest + options.max_tokens,
                       max(longest, len(prompts)))
    print(digest(ids, answer(stage, prompts, options.max_tokens)))


if __name__ == "__main__":
    main()
