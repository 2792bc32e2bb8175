"""Sinks: where metrics go beside metrics.jsonl. docs/guides/monitoring.md is the page for people."""

from treepo_mega.monitor.sinks.base import BUILT_IN, Run, Sink, SinkError, check_sinks, flat, open_sink
from treepo_mega.monitor.sinks.fan import Sinks

__all__ = ["BUILT_IN", "Run", "Sink", "SinkError", "Sinks", "check_sinks", "flat", "open_sink"]
