"""What a single call of attention is given, checked and laid out as kernels read it; the same for every backend."""

import numpy as np

from .numerics import PAGE


def padded_head_dim(head_dim: int) -> int:
    """The row length of the value pool: head_dim rounded up to whole vectors of 16."""
    return -(-head_dim // PAGE) * PAGE


def check(q, k, v, causal: bool, window: int) -> None:
    """Raises ValueError unless q [rows, heads, head_dim] are the last rows of k and v [positions, kv_heads, head_dim]."""
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[2] != k.shape[2] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q [rows, heads, head_dim] and k, v [positions, kv_heads, head_dim] are needed, kv_heads a divisor of "
                         f"heads, not {q.shape}, {k.shape}, {v.shape}")
    rows, positions = len(q), len(k)
    if window < 0 or (window and not causal) or not positions or (causal and rows > positions):
        raise ValueError(f"{rows} rows of {positions} positions, window {window}, {'' if causal else 'not '}causal: rows are the "
                         "last positions, and only causal attention has a window")


def positions_of(q, k, causal: bool) -> np.ndarray:
    """The last position that each row sees, int32 [rows]."""
    rows, positions = len(q), len(k)
    return np.arange(positions - rows, positions, dtype=np.int32) if causal else np.full(rows, positions - 1, np.int32)


def default_scale(head_dim: int) -> np.float32:
    """head_dim**-0.5."""
    return np.float32(1.0 / np.sqrt(np.float64(head_dim)))


def in_pages(k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [positions, kv_heads, head_dim] in pages, as the KV cache has them: float16 if both are, else float32."""
    positions, kv_heads, head_dim = k.shape
    dtype, pages = np.float16 if k.dtype == v.dtype == np.float16 else np.float32, -(-positions // PAGE)

    def filled(x: np.ndarray) -> np.ndarray:
        whole = np.zeros((pages * PAGE, kv_heads, head_dim), dtype)
        whole[:positions] = x
        return whole.reshape(pages, PAGE, kv_heads, head_dim)
    keys = np.ascontiguousarray(filled(k).transpose(0, 2, 3, 1))
    values = np.zeros((pages, kv_heads, PAGE, padded_head_dim(head_dim)), dtype)
    values[..., :head_dim] = filled(v).transpose(0, 2, 1, 3)
    return keys, values
