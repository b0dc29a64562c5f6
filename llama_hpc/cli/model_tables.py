"""A model's facts and what each rank of a grid holds of it, as text."""

from collections.abc import Mapping, Sequence

from llama_hpc.engine.layout import RankShare
from llama_hpc.model.sizes import packed_bits, parameters
from llama_hpc.runtime.tables import size, table
from llama_hpc.weights.store import Store


def fact_lines(facts: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each name and value."""
    return [f"{name:<20}{value}" for name, value in facts]


def model_facts(checkpoint, weights: str) -> list[tuple[str, str]]:
    """The shapes of a model, and what its ``weights`` format takes."""
    config = checkpoint.config
    stored = sorted({checkpoint.dtype(name) for name in checkpoint.names()})
    file_bytes = sum(checkpoint.stored_bytes(name) for name in checkpoint.names())
    layers, everything = packed_bits(config, weights)
    rope = config.rope.kind + (" with factors" if config.rope.factors else "")
    facts = [
        ("model", str(checkpoint.path)),
        ("family", config.family),
        ("parameters", f"{parameters(config) / 1e6:,.1f} M"),
        ("stored as", f"{', '.join(stored)}, {size(file_bytes)}"),
        ("layers", str(config.num_layers)),
        ("hidden_size", str(config.hidden_size)),
        ("intermediate_size", str(config.intermediate_size)),
        ("heads", f"{config.num_heads} query, {config.kv_heads} KV, head_dim {config.head_dim}"),
        ("vocabulary", f"{config.vocab_size}{', embeddings tied' if config.tie_embeddings else ''}"),
        ("context", f"{config.context_length} tokens, RoPE {rope}, theta {config.rope.theta:g}"),
        ("weights format", f"{weights}: {layers:.2f} bits a weight all in (layers), {everything:.2f} (all matrices)"),
    ]
    windows = sorted(set(config.windows) - {0})
    if windows:
        facts.insert(-1, ("sliding window", ", ".join(map(str, windows)) + " positions"))
    if isinstance(checkpoint, Store):
        facts.insert(1, ("quantised from", f"{checkpoint.source}, content {checkpoint.source_content_hash}"))
    return facts


def rank_lines(ranks: Sequence[RankShare], before: Mapping[str, Sequence[str]], behind: Mapping[str, Sequence[str]]) -> list[str]:
    """A table with a line for each rank; ``before`` what it holds and ``behind`` are more columns, by title."""
    titles = ("rank", "replica", "stage", "tensor", *before, "layers", "query heads", "KV heads", "FFN", "vocabulary", "weights",
              "KV cache", *behind)
    rows = []
    for number, rank in enumerate(ranks):
        share = rank.share
        vocabulary = _span(share.vocabulary) if rank.stage.first or rank.stage.last else "-"
        rows.append((str(number), str(rank.data), str(rank.stage_index), str(rank.tensor_index),
                     *(cells[number] for cells in before.values()), _span(rank.stage.layers), _span(share.query_heads),
                     _span(share.kv_heads), _span(share.ffn), vocabulary, size(rank.weights), size(rank.cache),
                     *(cells[number] for cells in behind.values())))
    return table(titles, rows)


def _span(held: range) -> str:
    return f"{held.start}-{held.stop - 1}" if len(held) else "none"
