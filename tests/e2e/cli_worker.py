"""The command `treepo-mega` as a forked rank: `cli_worker.py STDERR ARGUMENT...`; its errors go to that file alone."""

import os
import sys

from treepo_mega.cli import main

os.dup2(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
sys.exit(main(sys.argv[2:]))
