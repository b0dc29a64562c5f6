"""The model: configuration, shares, layers and the KV cache. Knows kernels and communicators, no files."""
