"""Rotary embedding: inverse frequencies in high precision, with the scalings that LLaMA-family models use.

Sources: RoFormer (Su et al. 2021); position interpolation (Chen et al. 2023); dynamic NTK and YaRN (Peng et al. 2023);
the Llama 3.1 scaling as published with its checkpoints.
"""

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext

import numpy as np

from llama_hpc.errors import UsageError
from llama_hpc.kernels.numerics import pi, rope_table, turn_fraction
from llama_hpc.model.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> list[Decimal]:
    """Radians a position for each of head_dim / 2 pairs, scaled; call inside a decimal context of high precision."""
    theta = Decimal(rope.theta)
    base = [(-Decimal(2 * i) / head_dim * theta.ln()).exp() for i in range(head_dim // 2)]
    if rope.factors is not None:
        base = [f / Decimal(divisor) for f, divisor in zip(base, rope.factors, strict=True)]
    factor = Decimal(rope.factor)
    if rope.kind == "linear":
        return [f / factor for f in base]
    if rope.kind == "llama3":
        return [_llama3(f, rope, factor) for f in base]
    if rope.kind == "yarn":
        return _yarn(base, rope, factor, theta, head_dim)
    return base


def _llama3(frequency: Decimal, rope: RopeConfig, factor: Decimal) -> Decimal:
    """Long waves are stretched, short ones kept, those between blended."""
    low, high = Decimal(rope.low_freq_factor), Decimal(rope.high_freq_factor)
    turns = rope.original_context * frequency / (2 * pi())
    if turns < low:
        return frequency / factor
    if turns > high:
        return frequency
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(base: list[Decimal], rope: RopeConfig, factor: Decimal, theta: Decimal, head_dim: int) -> list[Decimal]:
    """A ramp over the pairs from kept frequencies (many turns in the original context) to stretched ones."""
    def pair_of(turns: float) -> Decimal:
        return head_dim * (rope.original_context / (Decimal(turns) * 2 * pi())).ln() / (2 * theta.ln())
    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = low.to_integral_value(ROUND_FLOOR), high.to_integral_value(ROUND_CEILING)
    low, high = max(low, Decimal(0)), min(high, Decimal(head_dim - 1))
    width = high - low if high != low else Decimal("0.001")
    stretched = [min(max((i - low) / width, Decimal(0)), Decimal(1)) for i in range(len(base))]
    return [f / factor * s + f * (1 - s) for f, s in zip(base, stretched, strict=True)]


def attention_factor(rope: RopeConfig) -> Decimal:
    """What multiplies cos and sin: 1 but for YaRN."""
    if rope.kind != "yarn":
        return Decimal(1)
    if rope.attention_factor is not None:
        return Decimal(rope.attention_factor)
    def mscale(weight: float) -> Decimal:
        return Decimal(weight) * Decimal(rope.factor).ln() / 10 + 1 if rope.factor > 1 else Decimal(1)
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def check_positions(config: ModelConfig, positions: int) -> None:
    """Raises UsageError for dynamic scaling beyond the original context.

    There a key would depend on how long its sequence became later, so no cache could hold it.
    """
    rope = config.rope
    if rope.kind == "dynamic" and positions > (original := rope.original_context or config.context_length):
        raise UsageError(f"sequences of {positions} positions need dynamic RoPE scaling, which depends on the final length of a "
                         f"text and cannot be cached; keep each within {original} (--max-seq-len {original}, --window of score)")


def tables(config: ModelConfig, positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 [positions, head_dim / 2]. Raises UsageError as ``check_positions`` does."""
    check_positions(config, positions)
    rope = config.rope
    with localcontext() as context:
        context.prec = 50
        turns = [turn_fraction(f) for f in inverse_frequencies(rope, config.head_dim)]
        scale = float(attention_factor(rope))
    return rope_table(np.array(turns, np.uint64), positions, scale)
