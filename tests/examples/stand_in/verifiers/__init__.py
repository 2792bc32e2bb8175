"""A stand-in for the package of that name: what examples/python/verifiers_taskset.py uses of its version 0.4."""
