"""Kernels of llama_hpc: arrays in, arrays out; no MPI, no files, no models."""
