"""Process, device and seed plumbing: the only place that knows whether there is a GPU."""
