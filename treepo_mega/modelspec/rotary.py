"""Rotary positions: the types that actor and engine compute alike, and for which lengths. Pure.

    check_rotary(spec, longest, "path/config.json")     # raises ModelSpecError with the reason
    attention_factor(spec)                              # cosines and sines are multiplied by it
    engine_rope(spec)                                   # rope_parameters under which vLLM computes the same

The reference is transformers (`modeling_rope_utils.py`, 5.17). `longest` is the longest trajectory of a run, in tokens.
Most types are functions of the position alone. Two look at the length of the whole sequence, and a token of a tree
belongs to several of them:

- `dynamic` changes its base beyond max_position_embeddings, with every token that follows. No run is that long, and
  up to there the type is `default`.
- `longrope` has other factors beyond original_max_position_embeddings. vLLM decides once, by the longest sequence
  that its engine may hold, and so does the actor. Where `longest` is beyond, transformers would use the short factors
  for a short sequence, and neither of ours does.

Traps: vLLM 0.32 takes the table of `yarn` to end at factor * original_max_position_embeddings and reads beyond it; it
fails for a `linear` factor that is an integer; it scales `longrope` by max_position_embeddings whatever
`attention_factor` and `factor` say, unless short_mscale and long_mscale do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from treepo_mega.errors import nearest
from treepo_mega.modelspec.spec import ModelSpec, ModelSpecError

ROTARY_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
"""Rotary embeddings that actor and engine compute as transformers does."""

_ORIGINAL = "original_max_position_embeddings"
_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", _ORIGINAL),
    "longrope": (_ORIGINAL,),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
"""Keys that a type must have, each a positive number."""
_OPTIONAL_NUMBERS: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("factor", "attention_factor"),
}
_OTHER_KEYS: Mapping[str, tuple[str, ...]] = {"yarn": ("truncate",), "longrope": ("short_factor", "long_factor")}
_ENGINE_ONLY = ("alpha", "max_trained_positions", "mrope_section", "rope_dim", "short_mscale", "long_mscale")
"""Keys that change what vLLM computes and that transformers does not know."""
_OLD_NAMES = {"su": "longrope"}


def check_rotary(spec: ModelSpec, longest: int, where: str = "config.json") -> None:
    """Raise ModelSpecError unless actor and engine compute this model's rotation alike, for `longest` tokens.

    `where` names the file in errors.
    """
    kind, given = spec.rope_type, spec.rope_scaling
    if kind not in ROTARY_TYPES:
        hint = f" (did you mean {_OLD_NAMES[kind]!r}?)" if kind in _OLD_NAMES else nearest(kind, ROTARY_TYPES)
        raise ModelSpecError(f"{where}: rope_type {kind!r} is not supported; expected {', '.join(ROTARY_TYPES)}{hint}")
    if kind == "default" and "factor" in given:
        raise ModelSpecError(
            f"{where}: the rotary parameters have a factor {given['factor']!r} but no rope_type, so that it would "
            f"have no effect; set rope_type to one of {', '.join(ROTARY_TYPES[1:])}"
        )
    for key in _ENGINE_ONLY:
        if given.get(key) is not None:
            raise ModelSpecError(
                f"{where}: {key} is {given[key]!r} for rope_type {kind!r}; vLLM would compute another rotation with it "
                "than transformers, which does not know it; leave it out"
            )
    for key in _NUMBERS[kind]:
        _require_number(given.get(key), key, where)
    for key in _OPTIONAL_NUMBERS.get(kind, ()):
        if key in given:
            _require_number(given[key], key, where)
    if kind == "longrope":
        _check_longrope(spec, where)
    if kind == "yarn" and longest > (reach := int(given["factor"] * given[_ORIGINAL])):
        raise ModelSpecError(
            f"{where}: data.max_prompt_len + rollout.max_response_len = {longest} exceeds the {reach} positions of "
            f"rope_type 'yarn' (factor {given['factor']} x {_ORIGINAL} {given[_ORIGINAL]}), where vLLM's table ends"
        )


def _require_number(value: Any, key: str, where: str) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value <= 0 or (key == "factor" and value < 1):
        expected = "a number of at least 1" if key == "factor" else "a positive number"
        raise ModelSpecError(f"{where}: {key} of the rotary parameters is {value!r}; expected {expected}")


def _check_longrope(spec: ModelSpec, where: str) -> None:
    for key in ("short_factor", "long_factor"):
        values = spec.rope_scaling.get(key)
        if not isinstance(values, list) or len(values) != spec.head_dim // 2:
            found = f"a list of {len(values)}" if isinstance(values, list) else repr(values)
            raise ModelSpecError(
                f"{where}: {key} of the rotary parameters is {found}; expected a list of head_dim / 2 = "
                f"{spec.head_dim // 2} numbers"
            )
        for value in values:
            _require_number(value, f"an element of {key}", where)
    if spec.rope_scaling.get("factor") is None and not spec.max_position_embeddings:
        raise ModelSpecError(
            f"{where}: rope_type 'longrope' needs factor, or max_position_embeddings to derive it from"
        )


def long_factors(spec: ModelSpec, longest: int) -> bool:
    """Whether a run with trajectories of `longest` tokens uses the long factors of `longrope`, for every token."""
    return spec.rope_type == "longrope" and longest > spec.rope_scaling[_ORIGINAL]


def engine_length(spec: ModelSpec, longest: int) -> int:
    """vLLM's max_model_len: one token more than `longest`, so that a full trajectory can still be scored.

    Never past the model's positions, nor past those of longrope's short factors where the actor uses these.
    """
    length = min(longest + 1, spec.max_position_embeddings or longest + 1)
    # With one position more, vLLM would take the long factors for every token, and the actor the short ones.
    if spec.rope_type == "longrope" and not long_factors(spec, longest):
        return min(length, spec.rope_scaling[_ORIGINAL])
    return length


def attention_factor(spec: ModelSpec) -> float:
    """What cosines and sines are multiplied by, so that scores grow by its square; 1 for most types."""
    given = spec.rope_scaling
    if spec.rope_type not in ("yarn", "longrope"):
        return 1.0
    if (stated := given.get("attention_factor")) is not None:
        return float(stated)
    if spec.rope_type == "yarn":
        if given.get("mscale") and given.get("mscale_all_dim"):
            return _mscale(given["factor"], given["mscale"]) / _mscale(given["factor"], given["mscale_all_dim"])
        return _mscale(given["factor"])
    factor = given.get("factor") or (spec.max_position_embeddings or 0) / given[_ORIGINAL]
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(given[_ORIGINAL]))


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def engine_rope(spec: ModelSpec) -> dict[str, Any]:
    """rope_parameters for vLLM, under which it computes what transformers does; only for a checked model."""
    kind = spec.rope_type
    known = (*_NUMBERS[kind], *_OPTIONAL_NUMBERS.get(kind, ()), *_OTHER_KEYS.get(kind, ()))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": spec.rope_theta}
    rope |= {key: spec.rope_scaling[key] for key in known if key in spec.rope_scaling}
    # vLLM 0.32 tests for a float and takes anything else for a list of factors: an integer fails.
    if kind == "linear":
        rope["factor"] = float(rope["factor"])
    # Without both, vLLM 0.32 derives its own scale from max_position_embeddings and ignores attention_factor.
    if kind == "longrope":
        rope["short_mscale"] = rope["long_mscale"] = attention_factor(spec)
    return rope
