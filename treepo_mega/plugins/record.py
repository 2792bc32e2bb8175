"""The source of every plug-in travels with the run: a copy of each file and its SHA-256 under RUN_DIR/plugins.

    for line in record_plugins(cfg, run_dir, resumed=True): print(line)

`plugins/plugins.json` maps each configuration key to the function, its file, the digest and the copy. A copy's name
holds its digest, so that a resumed run keeps the sources of both its parts. Files that a plug-in imports are its own.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from treepo_mega.config import Config
from treepo_mega.plugins.trial import plugins_of
from treepo_mega.runtime.files import atomic_file
from treepo_mega.text.function_path import is_function_path, split_function_path

FOLDER = "plugins"
INDEX = "plugins.json"


def record_plugins(cfg: Config, run_dir: Path, *, resumed: bool) -> list[str]:
    """Copy the sources; returns a line for each plug-in that is not the one that the run had before it stopped.

    Not collective: one process writes. Nothing is written for a run without plug-ins that never had one.
    """
    folder = run_dir / FOLDER
    index = folder / INDEX
    before = _read(index) if resumed else {}
    now = {key: _record(folder, name) for key, name in named_functions(cfg).items()}
    if now or before:
        with atomic_file(index) as file:
            file.write(json.dumps(now, indent=1) + "\n")
    return [
        f"{key}: {entry['function']} has changed since this run began: sha256 {before[key]['sha256'][:12]} is now "
        f"{entry['sha256'][:12]}; {before[key]['copy']} in {folder} is what it was"
        for key, entry in now.items()
        if key in before and before[key]["sha256"] != entry["sha256"]
    ]


def named_functions(cfg: Config) -> dict[str, str]:
    """Key to name of every function that a run takes by path, rewards included."""
    verifiers = {"data.verifier": cfg.data.verifier}
    for part, sources in (("train", cfg.data.train), ("eval", cfg.data.eval)):
        verifiers |= {f"data.{part}.{index}.verifier": each.verifier or "" for index, each in enumerate(sources)}
    parts = enumerate(cfg.reward.functions)
    verifiers |= {f"reward.functions.{index}.verifier": each.verifier or "" for index, each in parts}
    named = {key: name for key, (_, name) in plugins_of(cfg).items()} | verifiers
    return {key: name for key, name in named.items() if is_function_path(name)}


def source_digests(cfg: Config) -> dict[str, str]:
    """SHA-256 of the file of each function that training depends on, by its key. Raises OSError for a missing one."""
    return {
        key: hashlib.sha256(Path(parts[0]).read_bytes()).hexdigest()
        for key, name in named_functions(cfg).items()
        if not key.startswith(("logging.", "data.eval.")) and (parts := split_function_path(name)) is not None
    }


def _record(folder: Path, name: str) -> dict[str, str]:
    parts = split_function_path(name)
    assert parts is not None, "named_functions gives names of this form alone"
    path = Path(parts[0])
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    copy = f"{path.stem}-{digest[:12]}.py"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / copy).exists():
        (folder / copy).write_bytes(source)
    return {"function": name, "sha256": digest, "copy": copy}


def _read(index: Path) -> dict[str, Any]:
    return json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
