"""The result file: one HDF5 file with prompts, answers, timing, provenance and a digest."""

from llama_hpc.results.digest import digest
from llama_hpc.results.reader import Results, read_results
from llama_hpc.results.schema import Output
from llama_hpc.results.writer import check_output_path, write_results

__all__ = ["Output", "Results", "check_output_path", "digest", "read_results", "write_results"]
