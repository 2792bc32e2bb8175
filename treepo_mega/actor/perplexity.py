"""Perplexity of held-out text under the actor: teacher-forced, through the loss head, like the old logprobs.

The text is the evaluation rows' reference text (`data.reference_key`): a worked solution, say. It follows the prompt as
a response would, its tokens (the end mark included) are the rows of the packs, and

    perplexity = exp( -(sum of their logprobs) / (number of them) )

at temperature 1 over all texts together, as a language model's perplexity is usually given. The model's own samples
would not do: under the model that wrote them their perplexity is only its entropy.

Texts longer than `rollout.max_response_len` are cut there (then without the end mark): a pack has no room for more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from treepo_mega.actor.batch import plan_batch
from treepo_mega.actor.update import Policy
from treepo_mega.config import Config
from treepo_mega.data.columns import REFERENCE_KEYS
from treepo_mega.data.prompts import Prompt
from treepo_mega.data.rows import PromptError
from treepo_mega.runtime import dist
from treepo_mega.text.tokenizer import Tokenizer
from treepo_mega.tree.pack import Batch, Trajectory


def reference_texts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, max_len: int, vocab_size: int | None = None
) -> list[Trajectory]:
    """The prompts that have a reference text, each followed by at most `max_len` tokens of it and its end mark.

    Raises PromptError for a token that a model of `vocab_size` ids does not have.
    """
    chosen = [prompt for prompt in prompts if prompt.reference]
    if not chosen:
        return []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # A begin mark belongs at the start of the prompt: one amid the text would be scored as a token of it.
    texts = tokenizer([prompt.reference for prompt in chosen], add_special_tokens=False)["input_ids"]
    out = []
    for i, (prompt, text) in enumerate(zip(chosen, texts, strict=True)):
        response = (list(text) + end)[:max_len]
        if vocab_size is not None and response and max(response) >= vocab_size:
            raise PromptError(
                f"{prompt.id}: the reference text has token {max(response)}, and the model knows ids below "
                f"{vocab_size} (config.json: vocab_size); choose another data.reference_key, or the model's own "
                "tokenizer"
            )
        out.append(Trajectory(i, prompt.tokens + response, len(prompt.tokens), 0.0, [0.0] * len(response)))
    return out


def describe_references(found: int, prompts: int, key: str) -> str:
    """For people: what eval/perplexity is of, or why there is none."""
    if found:
        return f"eval/perplexity is of the reference texts of {found} of {prompts} evaluation rows"
    tried = " nor ".join(REFERENCE_KEYS if key == REFERENCE_KEYS[0] else (key,))
    return f"no eval/perplexity: none of the {prompts} evaluation rows has a text under {tried} (data.reference_key)"


def perplexity(policy: Policy, texts: Sequence[Trajectory], cfg: Config) -> float:
    """Perplexity of the responses of `texts`, the same on every rank; at least one text is needed.

    In the precision of old logprobs. Collective over all ranks.
    """
    packs = plan_batch(Batch.flat(texts), cfg).packs
    # Not at the sampling temperature: figures of runs with other temperatures could not be compared.
    logprobs = policy.logprobs(packs, temperature=1.0) or []
    sums = dist.sum_over_replicas(
        {
            "nll": -float(sum(pack.sum(dtype="float64") for pack in logprobs)),
            "tokens": float(sum(pack.size for pack in logprobs)),
        }
    )
    mean = sums["nll"] / sums["tokens"]
    # math.exp raises OverflowError above 709 nats instead of returning infinity.
    return math.exp(mean) if mean < 700 else math.inf
