"""From the requests of a prompts file to token ids, checked against the model."""

import numpy as np

from llama_hpc.engine.answers import ReadyRequest, ends_of
from llama_hpc.engine.requests import Request, check_token_ids
from llama_hpc.engine.sampling_params import shown
from llama_hpc.errors import UsageError
from llama_hpc.model.config import ModelConfig
from llama_hpc.model.rope import check_positions


def prepare(requests: list[Request], tokenizer, config: ModelConfig, max_seq_len: int | None
            ) -> tuple[list[ReadyRequest], list[str | None]]:
    """Tokenised requests, and the text that each prompt had (None for token ids).

    ``max_seq_len`` limits prompt and answer together (default: the model's context). Raises UsageError for a prompt that
    does not fit, ids outside the vocabulary, text where the model has no tokenizer, and messages that no chat template
    takes.
    """
    check_max_seq_len(max_seq_len, config)
    limit = max_seq_len or config.context_length
    ready, texts = [], []
    for request in requests:
        ids, text = _tokens(request, tokenizer)
        check_token_ids(request, ids, config.vocab_size, limit)
        _check_sampling(request, tokenizer, config)
        tokens = min(request.params.max_tokens, limit - len(ids))
        ready.append(ReadyRequest(request.index, request.id, np.array(ids, np.int32), request.params, tokens, request.arrival_s))
        texts.append(text)
    check_positions(config, longest(ready))
    return ready, texts


def outputs_of(ready: list[ReadyRequest]) -> float:
    """The share of tokens whose logits are needed, those of answers, where all are as long as they may be."""
    answers = sum(request.params.n * request.limit for request in ready)
    return answers / (answers + sum(len(request.prompt) for request in ready))


def check_max_seq_len(max_seq_len: int | None, config: ModelConfig) -> None:
    """Raises UsageError for a limit beyond the model's context."""
    if max_seq_len is not None and max_seq_len > config.context_length:
        raise UsageError(f"--max-seq-len {max_seq_len} is longer than the model's context of {config.context_length}")


def _tokens(request: Request, tokenizer) -> tuple[list[int], str | None]:
    if tokenizer is None and (request.token_ids is None or request.params.stop):
        raise UsageError(f"request {shown(request.id)}: the model has no tokenizer, so give token_ids, and no stop strings")
    if request.token_ids is not None:
        return request.token_ids, None
    if request.messages is not None:
        try:
            text = tokenizer.render(request.messages)
        except UsageError as error:
            raise UsageError(f"request {shown(request.id)}: {error}") from None
        return tokenizer.encode(text, add_special=False), text
    return tokenizer.encode(request.prompt), request.prompt


def _check_sampling(request: Request, tokenizer, config: ModelConfig) -> None:
    """Settings that only the vocabulary can judge."""
    params, size = request.params, config.vocab_size
    for kind, tokens in (("stop token id", params.stop_token_ids), ("logit_bias token id", params.logit_bias)):
        for token in tokens:
            if token >= size:
                raise UsageError(f"request {shown(request.id)}: {kind} {token} is outside the vocabulary "
                                 f"(0 to {size - 1}): use the tokenizer of this model")
    if params.logprobs > size:
        raise UsageError(f"request {shown(request.id)}: logprobs is {params.logprobs}, but the vocabulary has {size} tokens: "
                         "lower logprobs")
    if params.min_tokens:
        ends = ends_of(params, eos_ids(config, tokenizer))
        if all(token in ends for token in range(size)):
            raise UsageError(f"request {shown(request.id)}: min_tokens is {params.min_tokens}, but every token of the vocabulary "
                             "ends the answer: leave some out of stop_token_ids")


def eos_ids(config: ModelConfig, tokenizer) -> frozenset[int]:
    """The end tokens of a model, of which its configuration and its tokenizer (None: has none) may name different ones."""
    return frozenset(config.eos_token_ids) | frozenset(tokenizer.eos_ids if tokenizer else ())


def longest(ready: list[ReadyRequest]) -> int:
    """Positions that the longest request can reach, prompt and answer."""
    return max(len(request.prompt) + request.limit for request in ready)
