"""Plug-ins: functions of people's own in place of ours, named `path/to/file.py:function` in a configuration key.

    check_plugins(cfg)                                  # at the start: imports, parameters, a call on an example
    values = plugin_advantages(name, tree, ...)         # every later call is checked as well

`contracts.py` says what each kind is called with and returns. docs/guides/plugins.md is the page for people.
"""

from treepo_mega.plugins.calls import (
    PluginError,
    is_per_node,
    open_sinks,
    plugin_advantages,
    plugin_keeps,
    split_of,
)
from treepo_mega.plugins.contracts import CONTRACTS, Advantage, Budget, Contract, Filter, Reward, Sink
from treepo_mega.plugins.trial import check_plugins, plugins_of, require_plugins

__all__ = [
    "CONTRACTS",
    "Advantage",
    "Budget",
    "Contract",
    "Filter",
    "PluginError",
    "Reward",
    "Sink",
    "check_plugins",
    "is_per_node",
    "open_sinks",
    "plugin_advantages",
    "plugin_keeps",
    "plugins_of",
    "require_plugins",
    "split_of",
]
