"""Kernels for NVIDIA GPUs: one CUDA C++ file each, and what launches them. They give the bits of ``cpu`` and ``reference``."""
