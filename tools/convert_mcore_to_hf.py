"""`treepo-mega convert to-hf` with the same options, from a checkout: `python` or `torchrun` and this file."""

import sys

from treepo_mega.cli import main

if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
