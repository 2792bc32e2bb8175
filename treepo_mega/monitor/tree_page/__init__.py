"""`treepo-mega tree RUN --step N`: the trees of a step as one HTML file that needs no network.

    path, notes = write_tree_page(Path("runs/demo"), step=20)      ->  runs/demo/trees/step_000020.html

`read.py` reads the run, `figures.py` makes numbers of a tree, `vocabulary.py` makes bytes of token ids, `page.py` puts
them into the template beside it. Everything that a model wrote travels as compressed base64, one block a tree, which no
`</script>` can leave. The page decodes a tree when it is opened, and writes its text as text.
"""

from __future__ import annotations

from pathlib import Path

from treepo_mega.monitor.tree_page.page import render_page
from treepo_mega.monitor.tree_page.read import TreePageError, load_run, select_prompt

__all__ = ["TreePageError", "write_tree_page"]


def write_tree_page(
    run_dir: Path, step: int | None = None, *, prompt: str | None = None, output: Path | None = None
) -> tuple[Path, list[str]]:
    """Write the page of a step of `run_dir`; returns its path, and notes on what could not be shown.

    Args:
        run_dir: The logging.run_dir of a run, which may be running still.
        step: Its trees are shown. None: the last one with trees.
        prompt: The id of a prompt, or its number in the file, from 1. None: all prompts.
        output: The file to write. None: beside the trees.

    Raises TreePageError, which names the file or the step, and what is there, when there is nothing to show.
    """
    run = load_run(run_dir, step)
    name = run.path.stem
    if prompt is not None:
        run = select_prompt(run, prompt)
        name += f"_prompt_{run.numbers[0]}"
    target = output or run.path.with_name(f"{name}.html")
    text, left_out = render_page(run)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TreePageError(f"{target}: cannot write the page: {error.strerror or error}") from None
    return target, [*run.notes, *left_out]
