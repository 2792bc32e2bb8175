"""`treepo-mega convert relayout` with the same options, from a checkout: `python` or `torchrun` and this file."""

import sys

from treepo_mega.cli import main

if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    sys.exit(main(["convert", "relayout", *sys.argv[1:]]))
