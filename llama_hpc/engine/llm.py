"""The engine from Python: a model under mpirun, in a script or in a notebook, on the grids and with the bits of the command line.

Nothing heavy is imported before a model is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from llama_hpc.engine.sampling_params import SamplingParams, is_integer
from llama_hpc.errors import UsageError
from llama_hpc.grid import GridShape
from llama_hpc.parallel import ParallelConfig
from llama_hpc.runtime.activity import HANG_LIMIT

if TYPE_CHECKING:
    import numpy as np
    from mpi4py import MPI

    from llama_hpc.engine.session import Session
    from llama_hpc.engine.state import InferenceState
    from llama_hpc.grid import Grid
    from llama_hpc.model.config import ModelConfig
    from llama_hpc.results import Output, Score

FORMATS = ("q3_5", "q4", "q8", "f16", "f32")      # of weights
REDUCE = ("auto", "mpi", "shared", "one-sided")
KV_CACHES = ("auto", "f16", "q8")
DEVICES = ("auto", "cpu", "gpu")


class Transformer:
    """A loaded model that computes logits. Making one, and every method, are collective over the ranks of ``comm``.

    ``model``: a Hugging Face folder, a GGUF file, a file of ``llama-hpc quantize``, or ``smollm2``. ``parallel``: the layout (by
    default, what memory allows). ``weights``: ``q3_5``, ``q4``, ``q8``, ``f16`` or ``f32`` (default: q8, or that of a model that
    is quantised). ``threads`` of each rank (default: OMP_NUM_THREADS, SLURM_CPUS_PER_TASK, or its share of the cores).
    ``max_seq_len``: limit of prompt and answer together (default: the model's context). ``reduce``, ``sequence_parallel``,
    ``overlap``, ``context_parallel``, ``kv_cache`` and ``device`` (auto, cpu or gpu): as of the command line. ``comm``: an MPI
    communicator (default: the world). ``progress``: shows how far long steps have come. ``hang_limit``: when ranks have stood
    still in a call for so many seconds, the job ends with a line that says where each of them is (0: never; a rank alone is not
    watched).

    All ranks make the same calls with the same arguments; of prompts, texts and token ids those of the first rank count. An error
    that all ranks share is raised on all of them. Under several ranks an exception that ends the script of one of them ends the
    job (not sys.exit on some ranks only). Raises UsageError, CheckpointError, DeviceUnavailable and LaunchError.
    """

    def __init__(self, model: str | PathLike, parallel: ParallelConfig | None = None, *, weights: str | None = None,
                 threads: int | None = None, max_seq_len: int | None = None, reduce: str = "auto",
                 sequence_parallel: int = 2048, overlap: int = 32, context_parallel: int = 1, kv_cache: str = "auto",
                 device: str = "auto", comm: MPI.Comm | None = None, progress: bool = False, hang_limit: float = HANG_LIMIT,
                 **batching: Any):
        from llama_hpc.runtime.abort import end_job_on_errors
        from llama_hpc.runtime.launch import check_world, world
        from llama_hpc.runtime.start import prepare
        everyone = world()
        check_world(everyone)
        if everyone.size > 1:
            end_job_on_errors()
        comm = everyone if comm is None else comm
        parallel = ParallelConfig() if parallel is None else parallel
        def read() -> GridShape | None:
            _check_choice("weights", weights, (None, *FORMATS))
            _check_choice("reduce", reduce, REDUCE)
            _check_choice("kv_cache", kv_cache, KV_CACHES)
            _check_choice("device", device, DEVICES)
            if not is_integer(context_parallel) or context_parallel < 1:
                raise UsageError(f"context_parallel must be a whole number of at least 1, got {context_parallel!r}")
            if not isinstance(hang_limit, int | float) or not 0 <= hang_limit < float("inf"):
                raise UsageError(f"hang_limit must be a number of seconds, or 0, got {hang_limit!r}")
            if not isinstance(parallel, ParallelConfig):
                raise UsageError(f"parallel must be a ParallelConfig, got {parallel!r}")
            return parallel.shape(comm.size)
        node, threads, shape = prepare(comm, threads, read)
        self._watchdog = _watch(comm, hang_limit)
        from llama_hpc.engine.model_job import ModelSettings
        from llama_hpc.engine.session import Session
        settings = ModelSettings(str(model), weights, threads, shape, reduce, sequence_parallel, overlap, kv_cache, progress,
                                 context_parallel, device=device)
        if parallel.micro_batches is not None:
            batching = {"micro_batches": parallel.micro_batches} | batching
        self._session: Session | None = Session(settings, comm, node, max_seq_len, batching)
        self._scratch: InferenceState | None = None

    @classmethod
    def load(cls, path: str | PathLike, parallel: ParallelConfig | None = None, **options: Any) -> Transformer:
        """Loads a model; ``options`` are those of the class."""
        return cls(path, parallel, **options)

    @property
    def session(self) -> Session:
        """The engine with the model. Raises UsageError where it was closed."""
        if self._session is None:
            raise UsageError("this model is closed: load it again")
        return self._session

    @property
    def config(self) -> ModelConfig:
        """The model's shapes and switches."""
        return self.session.checkpoint.config

    @property
    def grid(self) -> Grid:
        """This rank's place in the grid, and its communicators."""
        return self.session.grid

    def forward(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits float32 [n, vocab_size] after each of n tokens, a sequence of its own, on every rank. Collective.

        Raises UsageError for what are no token ids of the model, or more than its context, and NumericsError.
        """
        if self._scratch is None or self._scratch.max_seq_len < len(token_ids):
            if self._scratch is not None:
                self._scratch.close()
            # Powers of two: few texts of growing length need a new one.
            length = min(1 << max(8, (len(token_ids) - 1).bit_length()), self.session.context)
            self._scratch = self.state(length)
        self._scratch.rewind()
        return self._scratch.forward(token_ids)

    def state(self, max_seq_len: int | None = None) -> InferenceState:
        """An empty sequence for stepwise use. Collective.

        ``max_seq_len``: its tokens at most (default: that of the model, or 2048 where its context is longer).
        """
        from llama_hpc.engine.state import InferenceState
        return InferenceState(self, max_seq_len)

    def close(self) -> None:
        """Gives back threads and memory that ranks share; the model cannot be used afterwards. Collective."""
        if self._scratch is not None:
            self._scratch.close()
            self._scratch = None
        if self._session is not None:
            self._session.close()
            self._session = None
            if self._watchdog is not None:
                self._watchdog.stop()

    def __enter__(self) -> Transformer:
        return self

    def __exit__(self, kind, *exception: object) -> None:
        # After an error on one rank the others may be anywhere: closing is collective.
        if kind is None:
            self.close()


class LLM(Transformer):
    """A loaded model that answers prompts and scores texts; options as of ``Transformer``, and those of ``llama-hpc run``:

    ``max_seqs``: sequences that a replica answers at a time (64); ``token_budget``: tokens of a step at most (8192);
    ``kv_memory``: bytes of each rank's KV cache (default: 85 % of what it may use, less weights); ``micro_batches``,
    ``prefill_micro_batch``, ``decode_micro_batch``, ``prefix_sharing``, ``adapt``. None of these changes an answer.
    """

    def generate(self, prompts: Sequence[str | list[dict[str, str]] | Sequence[int]],
                 params: SamplingParams | Sequence[SamplingParams] | None = None) -> list[Output]:
        """Answers: for each prompt in turn its ``n`` samples, on every rank alike. Collective; may be called again and again.

        A prompt is a string, taken as it is, a list of chat messages (dictionaries with ``role`` and ``content``) put through the
        model's chat template, or token ids. ``params``: for all, or a list with one for each (default: greedy).

        An output has ``text``, ``tokens`` int32 [n], ``logprobs`` float32 [n], ``finish_reason`` (``stop`` or ``length``),
        ``request``, the number of its prompt, and ``sample``. Tokens and log-probabilities are those of ``llama-hpc run`` for
        prompts without ids: ``results.digest([str(i) for i in range(len(prompts))], outputs)`` is its digest.
        Raises UsageError, which names the prompt, and NumericsError.
        """
        return self.session.generate(prompts, SamplingParams() if params is None else params)

    def score(self, texts: Sequence[str | Sequence[int]], window: int | None = None, stride: int | None = None) -> list[Score]:
        """Log-probabilities of all tokens of each text, a string or token ids, on every rank alike. Collective.

        A score has ``tokens`` int32 [n], ``logprobs`` float32 [n] (NaN for a token without one, as the first) and ``perplexity``.
        ``window`` and ``stride`` as of ``llama-hpc score``, whose bits these are. Raises UsageError and NumericsError.
        """
        return self.session.score(texts, window, stride)


def _watch(comm: MPI.Comm, limit: float):
    """The watchdog of this process's calls, if it is to have one. Collective over ``comm``."""
    from pathlib import Path

    from llama_hpc.runtime.watchdog import start
    return start(comm, limit, Path.cwd() / "llama-hpc.hang", "begin again") if comm.size > 1 else None


def _check_choice(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise UsageError(f"{name} must be one of {', '.join(str(each) for each in allowed)}, got {value!r}")
