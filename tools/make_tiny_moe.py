"""Make a tiny reasoner with experts out of the one that ships: each dense MLP becomes a router and several experts.

    python tools/make_tiny_moe.py --out build/tiny_moe [--experts 4] [--noise 0.1] [--seed 1]

`--out` becomes a Hugging Face checkpoint (Mixtral) in the place of examples/tiny_reasoner, with its tokenizer, its
problems, and how it was made (report.json). It takes seconds: what it can is what the dense model was taught.

Every expert is a copy of the dense MLP with noise of its own, of `--noise` times each matrix's standard deviation, and
the router is random ("Sparse Upcycling", Komatsuzaki et al. (2022)). Mixtral's weights of a token's experts sum to 1:
without noise the model is exactly the dense one, whatever the router chooses. With it the experts differ, and a
token's choice matters to its loss.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from treepo_mega.errors import TreepoError  # noqa: E402
from treepo_mega.modelspec.mcore_layout import hf_shapes  # noqa: E402
from treepo_mega.modelspec.spec import ModelSpec  # noqa: E402
from treepo_mega.runtime.files import atomic_directory  # noqa: E402
from treepo_mega.runtime.seeding import derive_seed  # noqa: E402

DENSE = ROOT / "examples" / "tiny_reasoner"
EXPERTS_PER_TOKEN = 2
PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""Mixtral's names of an expert's matrices, and Llama's of an MLP's."""
ROUTER_SCALE = 1.0
"""Standard deviation of a router's logits at first: tokens choose differently, and no expert is always sure."""


def with_experts(dense: dict[str, Tensor], layers: int, experts: int, noise: float, seed: int) -> dict[str, Tensor]:
    """Llama's tensors by Hugging Face name -> Mixtral's."""
    generator = torch.Generator().manual_seed(derive_seed("tiny moe", seed))
    out = {name: value for name, value in dense.items() if ".mlp." not in name}
    for layer in range(layers):
        here = f"model.layers.{layer}"
        hidden = dense[f"{here}.input_layernorm.weight"].shape[0]
        # The router reads what a norm has made: about 1 in each of `hidden` places.
        router = torch.randn((experts, hidden), generator=generator)
        out[f"{here}.block_sparse_moe.gate.weight"] = router * ROUTER_SCALE / hidden**0.5
        for expert in range(experts):
            for name, projection in PROJECTIONS.items():
                matrix = dense[f"{here}.mlp.{projection}.weight"]
                own = torch.randn(matrix.shape, generator=generator) * matrix.std() * noise
                out[f"{here}.block_sparse_moe.experts.{expert}.{name}.weight"] = matrix + own
    return out


def make(out: Path, experts: int, noise: float, seed: int) -> None:
    """Write the checkpoint. Raises OutputExistsError where `out` is there."""
    config = json.loads((DENSE / "config.json").read_text(encoding="utf-8"))
    tensors = with_experts(load_file(DENSE / "model.safetensors"), config["num_hidden_layers"], experts, noise, seed)
    config |= {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
        "sliding_window": None,
    }
    config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias")}
    with atomic_directory(out) as directory:
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DENSE / name, directory / name)
        for path in DENSE.glob("*.jsonl"):
            shutil.copyfile(path, directory / path.name)
        wanted = hf_shapes(ModelSpec.from_hf(directory))
        assert {name: tuple(value.shape) for name, value in tensors.items()} == wanted
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        said = {"made_of": str(DENSE.relative_to(ROOT)), "experts": experts, "noise": noise, "seed": seed}
        (directory / "report.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Read the command line and make it; returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="a directory that is not there yet")
    p.add_argument("--experts", type=int, default=4, help="of each layer, of which a token takes 2")
    p.add_argument("--noise", type=float, default=0.1, help="of experts, in standard deviations of their matrices")
    p.add_argument("--seed", type=int, default=1)
    args = p.parse_args()
    if args.experts < EXPERTS_PER_TOKEN:
        p.error(f"--experts {args.experts}: a token takes {EXPERTS_PER_TOKEN}")
    try:
        make(args.out, args.experts, args.noise, args.seed)
    except TreepoError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{args.out}: {args.experts} experts a layer, a token takes {EXPERTS_PER_TOKEN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
