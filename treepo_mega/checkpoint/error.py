"""One error for all that is wrong with a checkpoint."""

from treepo_mega.errors import TreepoError


class CheckpointError(TreepoError):
    """A checkpoint is missing, incomplete or does not fit; the message names the directory and what to do."""
