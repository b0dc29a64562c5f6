"""``python -m llama_hpc``: the same as the command ``llama-hpc``."""

from llama_hpc.cli.main import program

if __name__ == "__main__":
    program()
