"""Grading: verifiers and the killable worker processes that run them.

Importing this package loads the standard library only, because every worker process imports it.
"""

from treepo_mega.data.rewards.items import RewardItem, RewardResult, Trajectory
from treepo_mega.data.rewards.pool import RewardPool
from treepo_mega.data.rewards.verifiers import VerifierError, check_verifier

__all__ = ["RewardItem", "RewardPool", "RewardResult", "Trajectory", "VerifierError", "check_verifier"]
