"""Ranks of a run built with fake tensors, to prove what `plan/` says about their memory."""
