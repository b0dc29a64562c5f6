"""LLaMA-family language models under MPI, with the same bits on every layout.

Names are imported when they are first used: ``import llama_hpc`` starts neither MPI nor Numba.
"""

__version__ = "0.1.0"

# Modules of public names. Of the first ones importing a name starts nothing.
_LIGHT = {
    "llama_hpc.engine.llm": ("LLM", "Transformer"),
    "llama_hpc.engine.sampling_params": ("SamplingParams",),
    "llama_hpc.grid": ("Grid", "GridShape"),
    "llama_hpc.parallel": ("ParallelConfig", "TensorParallelConfig", "TensorParallelStrategy"),
}
_HEAVY = {
    "llama_hpc.engine.pipeline": ("PipelineConfig", "PipelineStage", "PipelineState"),
    "llama_hpc.engine.state": ("InferenceState",),
    "llama_hpc.kernels.cpu.calls": ("attention", "matmul", "matvec", "pack_weights"),
    "llama_hpc.kernels.cpu.workers": ("NumaHint", "Pool", "WorkDistribution", "WorkStealingStats", "num_cpus"),
    "llama_hpc.model.attention": ("ParallelAttention",),
    "llama_hpc.model.functional": ("all_reduce_sum", "column_parallel_linear", "mlp_tensor_parallel", "row_parallel_linear"),
    "llama_hpc.model.layer": ("ParallelLayer",),
    "llama_hpc.model.linear": ("ColumnParallelLinear", "RowParallelLinear"),
    "llama_hpc.model.mlp": ("ParallelMLP",),
}
_MODULES = {name: module for module, names in (_LIGHT | _HEAVY).items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    if _MODULES[name] in _HEAVY:
        from llama_hpc.runtime import launch, numba_setup, topology
        launch.configure_mpi()
        numba_setup.configure(topology.default_threads(launch.local_tasks()))
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
