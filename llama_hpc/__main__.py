"""``python -m llama_hpc``: the same as the command ``llama-hpc``."""

import sys

from llama_hpc.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
