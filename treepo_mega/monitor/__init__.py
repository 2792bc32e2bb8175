"""Metrics, timers and reports."""
