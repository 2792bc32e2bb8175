"""A bad input, what it is answered with, and how the answer comes about: a row of docs/errors.md and a test.

Nothing here imports torch, so that the page can be made anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from treepo_mega.config import check, load_config
from treepo_mega.errors import TreepoError
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.preflight import preflight

REPO = Path(__file__).resolve().parents[2]
RECIPE = REPO / "examples/tiny_cpu.yaml"
MODEL = REPO / "examples/tiny_reasoner"


@dataclass(frozen=True, slots=True)
class BadInput:
    """`given`: the input as the page shows it. `says`: the message, with … for what differs from case to case.

    `do`: what to do about it. `answer(folder)`: gives the input, in a fresh folder, and returns the message.
    """

    area: str
    given: str
    says: str
    do: str
    answer: Callable[[Path], str]


def matches(says: str, message: str) -> bool:
    """Whether `message` has `says` in it, with anything on the line in place of each …

    >>> matches("… has no line 7", "train.jsonl has no line 7 of 6"), matches("a … b", "a b")
    (True, False)
    """
    parts = [re.escape(part.strip(" ")) for part in says.split("…")]
    return re.search(r"\s?.+?\s?".join(parts), " ".join(message.split())) is not None


def refusal(look: Callable[[], object]) -> str:
    """The message of the TreepoError that `look` raises. AssertionError when it raises none."""
    try:
        look()
    except TreepoError as error:
        return str(error)
    raise AssertionError("it was accepted")


def config(*overrides: str, ranks: int = 1) -> Callable[[Path], str]:
    """Overrides of the tiny recipe, and the rules for `ranks` processes."""

    def answer(_: Path) -> str:
        spec = ModelSpec.from_hf(MODEL)
        return refusal(lambda: check(load_config(RECIPE, list(overrides)), ranks, spec))

    return answer


def experts(*overrides: str, ranks: int = 32) -> Callable[[Path], str]:
    """Overrides of the recipe for a mixture of experts, and the rules for `ranks` processes."""

    def answer(_: Path) -> str:
        spec = ModelSpec.from_hf(REPO / "examples/configs/qwen3_30b_a3b")
        return refusal(lambda: check(load_config(REPO / "examples/recipes/experts.yaml", list(overrides)), ranks, spec))

    return answer


def dispatcher(name: str) -> Callable[[Path], str]:
    """The recipe for a mixture of experts with this token dispatcher, on a machine without a GPU."""

    def answer(_: Path) -> str:
        # The only one here that needs torch.
        from treepo_mega.actor import moe

        cfg = load_config(REPO / "examples/recipes/experts.yaml", [f"model.moe_token_dispatcher_type={name}"])
        with mock.patch.object(moe, "has_cuda", return_value=False):
            return refusal(lambda: moe.require_dispatcher(cfg.model))

    return answer


def yaml(text: str) -> Callable[[Path], str]:
    """A whole configuration file."""

    def answer(folder: Path) -> str:
        path = folder / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return refusal(lambda: load_config(path, []))

    return answer


def start(*overrides: str, ranks: int = 1) -> Callable[[Path], str]:
    """The tiny recipe with overrides, as a run that begins; `{here}` in them is the folder."""

    def answer(folder: Path) -> str:
        given = [text.format(here=folder) for text in overrides]
        cfg = load_config(RECIPE, [f"logging.run_dir={folder}/run", f"model.hf_checkpoint={MODEL}", *given])
        problems, _ = preflight(cfg, ranks, starting=True)
        assert problems, "it was accepted"
        return "\n".join(problems)

    return answer


def rows(text: str, *overrides: str) -> Callable[[Path], str]:
    """A file of prompts with these lines, as the only source."""

    def answer(folder: Path) -> str:
        (folder / "my.jsonl").write_text(text + "\n", encoding="utf-8")
        return start("data.train=[{{path: {here}/my.jsonl}}]", *overrides)(folder)

    return answer
