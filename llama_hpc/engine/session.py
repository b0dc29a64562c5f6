"""A model that stays loaded: answers, scores and logits, again and again, by the engine of the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from mpi4py import MPI

from llama_hpc.engine.answering import Batching, Crew, plan_batches
from llama_hpc.engine.answering import sizes_for as answering_sizes
from llama_hpc.engine.answers import ReadyRequest
from llama_hpc.engine.documents import Document, ReadyDocument, tokenize, window_and_stride, windows_of
from llama_hpc.engine.model_job import ModelJob, ModelSettings
from llama_hpc.engine.prepare import check_max_seq_len, prepare
from llama_hpc.engine.requests import Request
from llama_hpc.engine.sampling_params import SamplingParams, is_integer, shown
from llama_hpc.engine.scoring import plan_scoring, score, scores_of
from llama_hpc.engine.scoring import sizes_for as scoring_sizes
from llama_hpc.errors import UsageError
from llama_hpc.model.transformer import TransformerStage
from llama_hpc.results import Output, Score
from llama_hpc.runtime.abort import agreed, on_first
from llama_hpc.runtime.activity import doing
from llama_hpc.text import load_tokenizer

USUAL_LENGTH = 2048             # positions of a sequence that a grid and a state are made for, unless told otherwise
_SCORING_BUDGET = 512           # tokens of a step, as of ``llama-hpc score``


class Session(ModelJob):
    """A loaded model. Making one, and all methods, are collective; what the first rank gives counts, and all get the results.

    ``max_seq_len`` limits prompt and answer together (None: the model's context); ``batching`` are settings of ``Batching``.
    """

    @doing("loading a model")
    def __init__(self, settings: ModelSettings, comm: MPI.Comm, node: MPI.Comm, max_seq_len: int | None,
                 batching: Mapping[str, Any]):
        super().__init__(settings, comm, node)
        self.open()
        config = self.checkpoint.config
        with agreed(comm, "reading the settings"):
            allowed = [field.name for field in fields(Batching)]
            if unknown := [name for name in batching if name not in allowed]:
                raise UsageError(f"there is no option {shown(unknown[0])}: allowed are also {', '.join(allowed)}")
            self.batching = Batching(**batching)
            if max_seq_len is not None and not (is_integer(max_seq_len) and max_seq_len > 1):
                raise UsageError(f"max_seq_len must be a whole number of at least 2, got {shown(max_seq_len)}")
            check_max_seq_len(max_seq_len, config)
        self.max_seq_len, sequences = max_seq_len, self.batching.max_seqs
        self.choose_grid(comm.size * sequences, sequences, self.usual_length)
        self.compile()
        self.held = self.load()
        with agreed(comm, "loading the tokenizer"):
            self.tokenizer = load_tokenizer(self.checkpoint.path) if self.first or self.grid.is_leader else None
        self._stage: TransformerStage | None = None
        self._sizes: dict[str, int] = {}

    @property
    def context(self) -> int:
        """Positions that a sequence can have."""
        config = self.checkpoint.config
        return config.rope.original_context or config.context_length if config.rope.kind == "dynamic" else config.context_length

    @property
    def usual_length(self) -> int:
        """Positions of a sequence, where nothing else is known of it."""
        return self.max_seq_len or min(self.context, USUAL_LENGTH)

    @doing("generate")
    def generate(self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]) -> list[Output]:
        """The answers, prompt by prompt, sample by sample; their digest is that of ``llama-hpc run`` for prompts without ids."""
        ready = on_first(self.comm, self._requests, prompts, params)
        if not ready:
            return []
        plan = plan_batches(self, ready, self.batching)
        replica, _, _ = Crew(self, self._stage_for(answering_sizes(plan, ready)), plan, self.tokenizer).answer(ready)
        gathered = self.comm.gather(replica.outputs)
        outputs = [output for part in gathered for output in part] if self.first else []
        return self.comm.bcast(sorted(outputs, key=lambda output: (output.request, output.sample)))

    @doing("score")
    def score(self, texts: Sequence[Any], window: int | None, stride: int | None) -> list[Score]:
        """Log-probabilities of the tokens of each text, as ``llama-hpc score`` finds them."""
        documents, window, stride = on_first(self.comm, self._documents, texts, window, stride)
        if not documents:
            return []
        windows = windows_of(documents, window, stride)
        plan = plan_scoring(self, windows, min(_SCORING_BUDGET, sum(window.rows for window in windows)))
        (found, _), _, _ = score(self, self._stage_for(scoring_sizes(plan, windows)), plan, documents, windows)
        gathered = self.comm.gather(found)
        return self.comm.bcast(scores_of(documents, windows, gathered) if self.first else None)

    @doing("close")
    def close(self) -> None:
        """Gives back what the model takes; nothing may be called afterwards."""
        if self._stage is not None:
            self._stage.free()
        self._stage = self.held = None
        self.pool.close()

    def _requests(self, prompts: Sequence[Any], params: SamplingParams | Sequence[SamplingParams]) -> list[ReadyRequest]:
        _check_list("prompts", prompts)
        params = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(params) != len(prompts):
            raise UsageError(f"{len(prompts)} prompts, but {len(params)} SamplingParams: give one for all, or one for each")
        requests = []
        for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            if not isinstance(own, SamplingParams):
                raise UsageError(f"prompt {index}: its settings must be SamplingParams, got {shown(own)}")
            text = prompt if isinstance(prompt, str) else None
            messages = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict) else None
            ids = token_list(prompt) if text is None and messages is None else None
            try:
                requests.append(Request(index, str(index), text, messages, ids, own))
            except UsageError as error:
                raise UsageError(f"prompt {index}: {error}") from None
        return prepare(requests, self.tokenizer, self.checkpoint.config, self.max_seq_len)[0] if requests else []

    def _documents(self, texts: Sequence[Any], window: int | None, stride: int | None) -> tuple[list[ReadyDocument], int, int]:
        _check_list("texts", texts)
        window, stride = window_and_stride(window, stride, self.checkpoint.config)
        documents = [Document(str(index), text, None) if isinstance(text, str) else Document(str(index), None, token_list(text))
                     for index, text in enumerate(texts)]
        return tokenize(documents, self.tokenizer, self.checkpoint.config), window, stride

    def _stage_for(self, sizes: dict[str, int]) -> TransformerStage:
        """A stage of these sizes at least: the one of the last call, where it is large enough."""
        if self._stage is None or any(size > self._sizes[name] for name, size in sizes.items()):
            if self._stage is not None:
                self._stage.free()
                self._stage = None
            self._sizes = {name: max(size, self._sizes.get(name, 0)) for name, size in sizes.items()}
            self._stage = self.make_stage(self.held, **self._sizes)
        return self._stage


def token_list(ids: Any) -> Any:
    """Token ids as a list, where they are a sequence or an array of integers; anything else as it is, for others to refuse."""
    if isinstance(ids, np.ndarray) and ids.ndim == 1:
        return ids.tolist()
    return list(ids) if isinstance(ids, tuple | range) else ids


def _check_list(name: str, values: Any) -> None:
    if not isinstance(values, list | tuple):
        raise UsageError(f"{name} must be a list, got {shown(values)}")
