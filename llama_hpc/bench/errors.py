"""What can go wrong in a benchmark itself."""

from llama_hpc.errors import LlamaHpcError


class BenchmarkError(LlamaHpcError):
    """What was to be measured failed, hung, printed something else than its figures, or computed something wrong."""
