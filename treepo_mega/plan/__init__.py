"""Planning a run on paper. Pure."""
