"""The files that jobs write: answers with prompts, timing, provenance and a digest; scores of documents likewise."""

from llama_hpc.results.digest import digest
from llama_hpc.results.reader import Results, read_results
from llama_hpc.results.schema import Output
from llama_hpc.results.scores import Score, Scores, read_output, read_scores, write_scores
from llama_hpc.results.storage import check_output_path, check_rescue
from llama_hpc.results.writer import write_results

__all__ = ["Output", "Results", "Score", "Scores", "check_output_path", "check_rescue", "digest", "read_output", "read_results",
           "read_scores", "write_results", "write_scores"]
