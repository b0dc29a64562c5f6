"""LLaMA-family language models under MPI, with the same bits on every layout."""

__version__ = "0.1.0"
