"""How a tree spends its budget of leaves: level by level, or as quotas."""
