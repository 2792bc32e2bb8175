"""The verifier that is no function: the reward that an environment gives itself, by its get_reward."""

REWARD = "environment"
"""What people write as data.verifier, a source's verifier, or one of reward.functions."""
