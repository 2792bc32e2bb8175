"""Finished trees of the running step on disk, record by record, for the run that goes on after a kill."""
