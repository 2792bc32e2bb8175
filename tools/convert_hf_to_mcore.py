"""`treepo-mega convert to-mcore` with the same options, from a checkout: `python` or `torchrun` and this file."""

import sys

from treepo_mega.cli import main

if __name__ == "__main__":  # Megatron's checkpoint writer starts processes that import this file
    sys.exit(main(["convert", "to-mcore", *sys.argv[1:]]))
