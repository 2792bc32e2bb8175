"""What the shape of a model depends on, read from a Hugging Face `config.json`.

    spec = ModelSpec.from_hf("path/to/checkpoint")

`ModelSpec` is the only reader of `config.json` in the package, and the only description of a model that all parts
share. It is pure data: no torch, no transformers, so a plan for 512 ranks can be made on a laptop.

Adding an architecture is one small file in `architectures/`, as long as it is a pre-norm decoder with RMSNorm, rotary
positions, gated SiLU MLPs (dense, or experts in every layer) and grouped-query attention; its parameters are
spelled out in `mcore_layout.py` (Megatron) and `vllm_layout.py` (vLLM).

Traps: `config.json` leaves out keys that have the class default, and the default of one key differs between
architectures (`head_dim` of Qwen3 is 128 whatever the hidden size). transformers 5 writes
`rope_parameters`; older files have `rope_theta` and `rope_scaling`, whose kind is `type` or `rope_type`.
Anything that would change the mathematics and is not built (sliding windows, biases in the output
projection, another activation, partial rotary) is refused rather than ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from treepo_mega.errors import TreepoError, nearest
from treepo_mega.modelspec.architectures import Architecture, discover


class ModelSpecError(TreepoError):
    """The model cannot be described; the message names the file, the key, what was expected and what was found."""


ARCHITECTURES: Mapping[str, Architecture] = discover()

_SIZES = ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
"""Keys without a default."""

# Keys whose value must be this one (or be absent): another value is another network than the one built.
_REQUIRED_VALUES: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
        "quantization_config": None,
        "dual_chunk_attention_config": None,
    }
)
_WAY_OUT = {"dual_chunk_attention_config": "; leave the key out to train with plain attention"}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: sizes, switches and rotary parameters. Sizes are counts; `head_dim` is per head.

    `num_experts` 0: a dense MLP of `intermediate_size`. Otherwise every token takes `experts_per_token` of so many
    experts of `expert_intermediate_size` each, weighed by a softmax over all experts, or with `norm_topk_prob` over its
    own; and where `shared_expert_intermediate_size` is not 0, a gated expert of that width that all tokens share.
    `rope_type` is "default", "llama3", "linear", "yarn", ... and `rope_scaling` holds its other parameters
    (factor, low_freq_factor, ...), empty for "default". `stored_dtype` is the weights' dtype as the file names it, such
    as "bfloat16". `eos_token_ids` are those of config.json alone (`data/end_tokens.py` joins them with others).
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_scaling: dict[str, Any] = field(default_factory=dict, hash=False)
    max_position_embeddings: int | None = None
    num_experts: int = 0
    experts_per_token: int = 0
    expert_intermediate_size: int = 0
    norm_topk_prob: bool = False
    shared_expert_intermediate_size: int = 0
    stored_dtype: str | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def names(self) -> Mapping[str, str]:
        """HF names inside a layer, by role (`architectures/__init__.py`)."""
        return ARCHITECTURES[self.architecture].names

    @classmethod
    def from_hf(cls, directory: str | Path) -> ModelSpec:
        """Read `directory`/config.json.

        Raises ModelSpecError: missing file, bad JSON, unsupported architecture or value.
        """
        path = Path(directory) / "config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelSpecError(
                f"cannot read {path}: {error.strerror or error}; expected a Hugging Face checkpoint directory with "
                "config.json (model.hf_checkpoint)"
            ) from None
        except json.JSONDecodeError as error:
            raise ModelSpecError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
        except ValueError as error:
            raise ModelSpecError(f"{path}: not UTF-8 text: {error}") from None
        if not isinstance(config, dict):
            raise ModelSpecError(f"{path}: expected a JSON object, found {type(config).__name__}")
        return cls.from_config(config, where=str(path))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
        """The same from a loaded config; `where` names it in errors."""
        name, arch = _architecture(config, where)
        if missing := [key for key in _SIZES if not isinstance(config.get(key), int)]:
            raise ModelSpecError(
                f"{where}: expected a transformers model configuration; missing or not an integer: {', '.join(missing)}"
            )
        for key, expected in {**_REQUIRED_VALUES, **arch.required}.items():
            if config.get(key, expected) not in (expected, None):
                raise ModelSpecError(
                    f"{where}: {key} is {config[key]!r}; only {expected!r} is supported for {name}"
                    f"{_WAY_OUT.get(key, '')}"
                )
        heads = _count(config, "num_attention_heads", where)
        hidden = _count(config, "hidden_size", where)
        kv_heads = _count(config, "num_key_value_heads", where, default=heads)
        if heads % kv_heads:
            raise ModelSpecError(
                f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        if arch.head_dim is None and not config.get("head_dim") and hidden % heads:
            raise ModelSpecError(f"{where}: hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        theta, rope_type, scaling = _rope(config, where)
        return cls(
            architecture=name,
            hidden_size=hidden,
            num_layers=_count(config, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=_count(config, "head_dim", where, default=arch.head_dim or hidden // heads),
            intermediate_size=_count(config, "intermediate_size", where),
            vocab_size=_count(config, "vocab_size", where),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=arch.qkv_bias,
            qk_norm=arch.qk_norm,
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_type=rope_type,
            rope_scaling=scaling,
            max_position_embeddings=config.get("max_position_embeddings"),
            **_experts(config, arch, where),
            stored_dtype=config.get("dtype") or config.get("torch_dtype"),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
        )


def _experts(config: Mapping[str, Any], arch: Architecture, where: str) -> dict[str, Any]:
    """The fields of ModelSpec that say what an MLP of experts is; none for a dense one."""
    if not arch.experts:
        return {}
    key = next((name for name in arch.experts if config.get(name) is not None), arch.experts[0])
    count = _count(config, key, where)
    taken = _count(config, "num_experts_per_tok", where)
    if taken > count:
        raise ModelSpecError(f"{where}: num_experts_per_tok is {taken}; there are {count} experts ({key})")
    normed = config.get("norm_topk_prob", False) if arch.norm_topk_prob is None else arch.norm_topk_prob
    if taken == 1 and normed:
        raise ModelSpecError(
            f"{where}: num_experts_per_tok is 1 and the weights of a token's experts sum to 1: the one expert always "
            "weighs 1, and the router would learn nothing; set norm_topk_prob to false"
        )
    shared = _count(config, arch.shared_expert_size, where) if arch.shared_expert_size else 0
    return {
        "num_experts": count,
        "experts_per_token": taken,
        "expert_intermediate_size": _count(config, arch.expert_size, where),
        "norm_topk_prob": bool(normed),
        "shared_expert_intermediate_size": shared,
    }


def padded_vocab(spec: ModelSpec, divisible_by: int, tp: int) -> int:
    """Rows of Megatron's embedding: vocab_size rounded up to a multiple of divisible_by * tp."""
    multiple = divisible_by * tp
    return -(-spec.vocab_size // multiple) * multiple


def _architecture(config: Mapping[str, Any], where: str) -> tuple[str, Architecture]:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelSpecError(
            f"{where}: architectures is {names!r}; expected a list with one of {', '.join(ARCHITECTURES)}"
        )
    name = names[0]
    if name not in ARCHITECTURES:
        raise ModelSpecError(
            f"{where}: architecture {name} is not supported{nearest(name, ARCHITECTURES, cutoff=0.0)}; supported: "
            + ", ".join(ARCHITECTURES)
        )
    return name, ARCHITECTURES[name]


def _count(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelSpecError(f"{where}: {key} is {value!r}; expected a positive integer")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    """One id or a list of them."""
    return tuple(each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))


def _rope(config: Mapping[str, Any], where: str) -> tuple[float, str, dict[str, Any]]:
    """(theta, type, other parameters) from transformers 5's rope_parameters or the older rope_theta + rope_scaling."""
    found = {key: _rope_of(config, key, where) for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    if len(found) == 2 and found["rope_parameters"] != found["rope_scaling"]:
        raise ModelSpecError(
            f"{where}: rope_parameters {config['rope_parameters']!r} and rope_scaling {config['rope_scaling']!r} do "
            "not agree; keep one of them"
        )
    return next(iter(found.values())) if found else _rope_of(config, "rope_parameters", where)


def _rope_of(config: Mapping[str, Any], key: str, where: str) -> tuple[float, str, dict[str, Any]]:
    given = config.get(key) or {}
    if not isinstance(given, Mapping) or any(isinstance(v, Mapping) for v in given.values()):
        raise ModelSpecError(f"{where}: {key} is {given!r}; expected one flat object for all layers")
    rope = dict(given)
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    old_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", old_type or "default")
    if old_type not in (None, rope_type):
        raise ModelSpecError(f"{where}: {key} has rope_type {rope_type!r} and type {old_type!r}; keep rope_type alone")
    partial = rope.pop("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelSpecError(f"{where}: partial_rotary_factor is {partial!r}; only 1.0 is supported")
    if not isinstance(theta, int | float) or theta <= 0:
        raise ModelSpecError(f"{where}: rope_theta is {theta!r}; expected a positive number")
    if rope_type in ("llama3", "yarn", "longrope"):
        # As transformers has it: beside the parameters the key comes first, and without any the window is the original.
        key, window = "original_max_position_embeddings", config.get("max_position_embeddings")
        if config.get(key) is not None:
            rope[key] = config[key]
        rope.setdefault(key, window)
    return float(theta), str(rope_type), rope
