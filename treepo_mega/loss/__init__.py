"""From hidden states to the policy gradient without ever holding [T, V] logits."""
