"""Run as one rank: every way in which a checkpoint can be damaged, through the commands that meet it.

    damage_worker.py HF SHARDED TIED OTHER DIRECTORY

HF, SHARDED: one llama checkpoint, in one file and in several; TIED: a tied qwen2 one; OTHER: qwen3. Prints, after
"FOUND", a JSON object: case -> error; and what is left in DIRECTORY. Ends as `treepo-mega train` on a damaged
checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from treepo_mega import cli
from treepo_mega.actor.model import build_model
from treepo_mega.checkpoint.mcore import MANIFEST, CheckpointError, load_model_weights
from treepo_mega.convert.convert import conversion_config
from treepo_mega.modelspec.spec import ModelSpec

TOOLS = Path(__file__).resolve().parents[2] / "tools"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"


def command(tool: str, *arguments: object) -> str:
    """The error with which a converter ends, "" when it does its work."""
    sys.argv = [tool, *map(str, arguments)]
    said = io.StringIO()
    code: object = "no exit"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(str(TOOLS / tool), run_name="__main__")
        except SystemExit as end:
            code = end.code
    if code not in (0, 2):
        raise AssertionError(f"{tool} ended with {code}: {said.getvalue()}")
    return said.getvalue() if code else ""


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Damage to the tensors of a checkpoint's only file."""

    def damage(directory: Path) -> None:
        loaded = load_file(directory / WEIGHTS)
        change(loaded)
        save_file(loaded, directory / WEIGHTS, metadata={"format": "pt"})

    return damage


def second_shard(directory: Path) -> Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


def last_part(directory: Path) -> Path:
    """The last data file of a Megatron checkpoint: versions of Megatron-Core write different numbers of them."""
    return sorted(directory.glob("*.distcp"))[-1]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def misplace(directory: Path) -> None:
    """The index sends a tensor to a shard that does not have it."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][NAME] = next(f for f in index["weight_map"].values() if f != index["weight_map"][NAME])
    (directory / INDEX).write_text(json.dumps(index))


def rename_in_megatron(directory: Path) -> None:
    """A tensor under another name, in a checkpoint whose digests fit."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    known = metadata.state_dict_metadata
    known["decoder.final_norm.weight"] = known.pop("decoder.final_layernorm.weight")
    path.write_bytes(pickle.dumps(metadata))
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"][path.name] = path.stat().st_size
    manifest["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(manifest))


FROM_HF: dict[str, tuple[int, Callable[[Path], None]]] = {
    # Which of the checkpoints given, and what happens to it.
    "missing tensor": (0, tensors(lambda t: t.pop(NAME))),
    "renamed tensor": (0, tensors(lambda t: t.update({"model.layers.1.mlp.upp_proj.weight": t.pop(NAME)}))),
    "padded vocabulary": (0, tensors(lambda t: t.update({"lm_head.weight": torch.zeros(304, 32)}))),
    "padded width": (0, tensors(lambda t: t.update({NAME: torch.zeros(64, 32)}))),
    "integers": (0, tensors(lambda t: t.update({NAME: torch.zeros(48, 32, dtype=torch.int8)}))),
    "truncated file": (0, lambda d: truncate(d / WEIGHTS)),
    "damaged header": (0, lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 9 + (d / WEIGHTS).read_bytes()[9:])),
    "truncated shard": (1, lambda d: truncate(second_shard(d))),
    "missing shard": (1, lambda d: second_shard(d).unlink()),
    "misplaced tensor": (1, misplace),
    "tied head that differs": (2, tensors(lambda t: t.update({"lm_head.weight": torch.zeros(301, 32)}))),
}
FROM_MEGATRON: dict[str, Callable[[Path], object]] = {
    "flipped bit": lambda d: flip(d / "__0_0.distcp"),
    "flipped bit in the metadata": lambda d: flip(d / ".metadata"),
    "truncated": lambda d: truncate(last_part(d)),
    "missing file": lambda d: last_part(d).unlink(),
    "renamed": rename_in_megatron,
    "one layer more": lambda d: config(d, num_hidden_layers=5),
    "another vocabulary, padded alike": lambda d: config(d, vocab_size=300),
    "wider": lambda d: config(d, intermediate_size=64),
}


def config(directory: Path, **changes: object) -> None:
    path = directory / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def main() -> None:
    """All cases."""
    *sources, other, directory = map(Path, sys.argv[1:])
    found, mcore, work = {}, directory / "mcore", directory / "work"
    for case, (which, damage) in FROM_HF.items():
        shutil.copytree(sources[which], work)
        damage(work)
        found[case] = command("convert_hf_to_mcore.py", "--hf", work, "--save", directory / "out")
        shutil.rmtree(work)
    found["whole"] = command("convert_hf_to_mcore.py", "--hf", sources[0], "--save", mcore, "--no-verify")
    for case, damage in FROM_MEGATRON.items():
        shutil.copytree(mcore, work)
        damage(work)
        found[case] = command("convert_mcore_to_hf.py", "--load", work, "--save", directory / "out")
        shutil.rmtree(work)
    for case, tool in (("another model", "convert_mcore_to_hf.py"), ("again", "convert_mcore_to_mcore.py")):
        found[case] = command(tool, "--load", mcore, "--hf", other, "--save", directory / "out")

    damaged = directory / "damaged"
    shutil.copytree(mcore, damaged)
    flip(damaged / "__0_0.distcp")
    models = build_model(conversion_config(sources[0]), ModelSpec.from_hf(sources[0]))
    with torch.no_grad():
        for p in models[0].parameters():
            p.fill_(7)
    try:
        load_model_weights([*models], damaged)
    except CheckpointError as e:
        found["by the trainer"] = str(e)
    assert all(bool((p == 7).all()) for p in models[0].parameters()), "nothing half-loaded"
    left = sorted(p.name for p in directory.iterdir())
    print("FOUND " + json.dumps({"errors": found, "left": left}), flush=True)
    data = [f"model.hf_checkpoint={sources[0]}", f"logging.run_dir={directory}/run", "rollout.stop.eos_token_ids=[2]"]
    sys.exit(cli.main(["train", "examples/tiny_cpu.yaml", f"model.load={damaged}", *data]))


if __name__ == "__main__":
    main()
