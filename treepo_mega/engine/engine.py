"""vLLM in the trainer's own process: submit token ids, step, take segments; new weights in place.

    engine = Engine("path/to/hf", cfg, seed=0)
    engine.submit(SegmentRequest(name="r0", prefix=prefix, max_tokens=16, seed=7, stop_token_ids=[2]))
    while engine.busy:
        for finished in engine.step(): ...       # submit more at any time
    engine.update_weights_by(reshard)            # all of them, in place, through engine.weight_target()
    engine.score(token_ids)                      # logprobs of given tokens

Under torchrun every rank builds one (`external_launcher`): with `tensor_parallel_size` 1 the engines are
independent; with more, the ranks of an engine must make the same calls in the same order. Building is collective
over all ranks. Logprobs are those of the distribution sampled from, after temperature (`processed_logprobs`),
in nats; at temperature 0 (greedy) those of temperature 1.

Building it, and what vLLM does to the process meanwhile: `engine/vllm_setup.py`; requests and what comes back of them:
`engine/stream.py`. Traps that are hidden here:

- Deleting the engine destroys torch.distributed's default process group, the trainer's: hold the `Engine` until
  the process ends.
- The KV cache of old weights would be reused: the prefix cache is reset with every update.
- vLLM reuses full KV blocks only; what a prefix shares of a partial block is copied (`engine/branch_cache.py`). A
  segment's last token has no KV yet, so a resubmitted prefix computes one token.

The engine's vocabulary is config.json's: the rows by which Megatron pads the embedding do not exist here and cannot
be sampled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from treepo_mega.checkpoint.hf import check_files
from treepo_mega.config import Config
from treepo_mega.engine.routing import RoutingNotes
from treepo_mega.engine.stream import EngineError, Finished, SegmentRequest, SegmentStream
from treepo_mega.engine.vllm_setup import build, check_model, process_left_alone, rotation_overrides
from treepo_mega.engine.vllm_target import VllmTarget
from treepo_mega.modelspec.rotary import engine_length
from treepo_mega.modelspec.spec import ModelSpec
from treepo_mega.runtime.pulse import pulse


class Engine:
    """One vLLM engine (or this rank's part of one). See the module docstring."""

    def __init__(self, hf_dir: str | Path, cfg: Config, *, seed: int = 0, weights_follow: bool = False) -> None:
        """Load the checkpoint at `hf_dir`; with `weights_follow` only its shapes, and all weights must be written.

        Raises EngineError for a model or layout that vLLM cannot take, ModelSpecError for a rotation that it would
        compute otherwise than the actor, HfCheckpointError for missing or broken files.
        """
        self.hf_dir = Path(hf_dir)
        spec = ModelSpec.from_hf(self.hf_dir)
        check_model(self.hf_dir, spec, cfg)
        self.vocab_size = spec.vocab_size
        self.max_model_len = engine_length(spec, cfg.max_model_len)
        check_files(self.hf_dir)
        self._open: dict[str, SegmentStream] = {}  # by vLLM's id
        self._next = 0
        self._broken = "the engine was built without weights" if weights_follow else ""
        with process_left_alone():
            self._llm = build(
                self.hf_dir, cfg, self.max_model_len, seed, rotation_overrides(spec), weights_follow=weights_follow
            )
        self._routing: RoutingNotes | None = None
        if cfg.rollout.notes_routing:
            self._routing = self._llm.collective_rpc("note_routing", args=(spec,))[0]
        produced = self._llm.collective_rpc("engine_vocab_size")[0]
        if produced != self.vocab_size:
            raise EngineError(
                f"{self.hf_dir}: the engine samples from {produced} ids, config.json has {self.vocab_size}"
            )

    @property
    def busy(self) -> bool:
        """True while submitted requests have not finished."""
        return bool(self._open)

    @property
    def unfinished(self) -> list[str]:
        """Ids of the submitted requests that have not finished, oldest first."""
        return [stream.name for stream in self._open.values()]

    @property
    def kv_blocks(self) -> int:
        """Blocks of `block_size` tokens that the KV cache holds (one of them is vLLM's own)."""
        # vLLM's block pool takes one block out as its null block, which no request is ever given.
        return int(self._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks) - 1

    def submit(self, request: SegmentRequest) -> SegmentStream:
        """Queue a request; the segments of its stream come out of `step`.

        Raises EngineError when the request cannot be computed as asked.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_prefix(request.prefix, request.total_tokens, request.name)
        # Asked of the streams: `extend` gives them other names while they run.
        if any(stream.name == request.name for stream in self._open.values()):
            raise EngineError(f"request {request.name!r} is already running")
        kind = RequestOutputKind.DELTA if request.looks_at_each_token else RequestOutputKind.FINAL_ONLY
        params = SamplingParams(
            temperature=request.temperature,
            max_tokens=request.total_tokens,
            seed=request.seed if request.temperature > 0 else None,
            logprobs=request.reported,
            # Lists of numbers: an object for each token would keep the garbage collector busy.
            flat_logprobs=True,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,  # our own list is the whole truth about EOS
            detokenize=False,
            output_kind=kind,
            # Made for this request alone: vLLM's deep copy of it costs more than all else that a request costs.
            skip_clone=True,
        )
        vllm_id = self._add(request.prefix, params)
        stream = SegmentStream(request, lambda: self._abort(vllm_id))
        self._open[vllm_id] = stream
        return stream

    def step(self) -> list[Finished]:
        """One forward pass over everything that runs; what finished in it. Empty when idle.

        Raises EngineError while a run waits for `extend` or `cancel`.
        """
        if not self._open:
            return []
        if waiting := [stream.name for stream in self._open.values() if stream.waits]:
            raise EngineError(f"runs wait for extend or cancel: {waiting[:5]}")
        out = []
        pulse().beat("engine")
        for output in self._llm.llm_engine.step():
            vllm_id = self._match(output.request_id)
            stream = self._open[vllm_id]
            stream.add(output.outputs[0])
            reason = str(output.outputs[0].finish_reason) if output.finished else None
            segment = stream.next_segment(reason, output.num_cached_tokens or 0, self.vocab_size)
            if segment is None:
                continue
            if self._routing is not None:
                begin, end = stream.take_computed(segment)
                segment = replace(segment, experts=self._routing.read(vllm_id, begin, end), experts_from=begin)
            out.append(segment)
            if segment.more:
                continue
            if output.finished:
                del self._open[vllm_id]
            else:
                # Our own border ended it, of which vLLM knows nothing: it would sample on.
                self._abort(vllm_id)
        return out

    def _abort(self, vllm_id: str) -> None:
        self._llm.llm_engine.abort_request([vllm_id])
        del self._open[vllm_id]

    def abort(self) -> None:
        """Drop every unfinished request, oldest first."""
        # One call for each: vLLM puts the ids of a call into a set, and its ids end with random digits. Ranks of one
        # engine would free blocks in different orders, and later find different prefixes in their caches.
        for vllm_id in list(self._open):
            self._abort(vllm_id)

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes. Raises EngineError while requests run."""
        if not self._open:
            self._drain()
        if self._open or not self._llm.reset_prefix_cache():
            raise EngineError(f"the prefix cache cannot be reset; unfinished requests: {self.unfinished[:5]}")

    def _drain(self) -> None:
        """Finish the steps in flight of an engine that nobody waits for."""
        # Under async scheduling a request that a stop token ends has a step in flight, and vLLM frees its blocks only
        # after that step: until then the prefix cache cannot be reset, and the engine can neither sleep nor change.
        core = self._llm.llm_engine.engine_core.engine_core
        while core.batch_queue:
            self._llm.llm_engine.step()

    def sleep(self, level: int = 1) -> None:
        """Give device memory away: vLLM's sleep level 1 keeps the weights on the host, 2 drops them.

        Raises EngineError while requests run. No memory moves on a CPU.
        """
        if self._open:
            raise EngineError(f"the engine cannot sleep while requests run: {self.unfinished[:5]}")
        self._drain()
        self._llm.sleep(level=level)

    def wake_up(self, tags: Sequence[str]) -> None:
        """Take the memory of these tags back: "weights", "kv_cache"."""
        self._drain()
        self._llm.wake_up(tags=list(tags))

    @property
    def branch_cache(self) -> Any:
        """What finds the blocks to copy (`engine/branch_cache.py`); None without `copy_partial_blocks`."""
        return self._llm.llm_engine.engine_core.engine_core.scheduler.connector

    def weight_target(self) -> VllmTarget:
        """This rank's part of the engine as the destination of a reshard (`engine/vllm_target.py`)."""
        # The only answer: under `external_launcher` a process has one worker, that of its own rank.
        return self._llm.collective_rpc("weight_target")[0]

    def update_weights_by(self, reshard: Callable[[], Any]) -> Any:
        """Let `reshard` write all weights through `weight_target`; returns what it returns.

        The prefix cache is reset afterwards. Raises EngineError for unfinished requests. After a failure half way
        the engine refuses to sample until a complete update.
        """
        with self._weights_changing():
            return reshard()

    @contextlib.contextmanager
    def _weights_changing(self) -> Iterator[None]:
        if self._open:
            raise EngineError(f"weights cannot change while requests run: {self.unfinished[:5]}")
        self._drain()
        # Set before, cleared after success alone: an exception in between leaves weights of two updates.
        self._broken = "the last weight update did not complete"
        yield
        self.reset_prefix_cache()  # the KV of the old weights would be reused
        self._broken = ""

    def score(self, token_ids: Sequence[int], temperature: float = 1.0) -> list[float]:
        """Logprobs (nats, at `temperature` > 0) of `token_ids[1:]`, each given all tokens before it.

        Computed afresh, without the prefix cache. The engine must be idle.
        """
        from vllm import SamplingParams

        if self._open:
            raise EngineError(f"scoring needs an idle engine; running: {self.unfinished[:5]}")
        self._drain()
        self._check_prefix(token_ids, 1, "score")
        # vLLM takes prompt logprobs from the logits before temperature, so the logits themselves are scaled.
        old = self._llm.collective_rpc("scale_logits", args=(1.0 / temperature,))[0]
        try:
            # A request with `prompt_logprobs` reads no prefix cache in vLLM; 0 asks for the prompt's own tokens alone.
            params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
            self._add(token_ids, params)
            outputs: list[Any] = []
            while self._llm.llm_engine.has_unfinished_requests():
                outputs += self._llm.llm_engine.step()
        finally:
            now = self._llm.collective_rpc("scale_logits", args=(1.0,))[0]
            self._llm.collective_rpc("scale_logits", args=(old / now,))
        entries = outputs[-1].prompt_logprobs[1:]
        return [entry[token].logprob for entry, token in zip(entries, token_ids[1:], strict=True)]

    def _add(self, prefix: Sequence[int], params: Any) -> str:
        from vllm.inputs.engine import tokens_input

        self._next += 1
        name = str(self._next)
        # As vLLM's renderer would make it of a raw prompt: there is nothing to render.
        self._llm.llm_engine.add_request(name, tokens_input(list(prefix)), params)
        return name

    def _match(self, name: str) -> str:
        """vLLM may add a suffix to the id it was given; ours are bare numbers."""
        bare = name if name in self._open else name.partition("-")[0]
        if bare not in self._open:
            raise EngineError(f"vLLM finished a request {name!r} that was not submitted")
        return bare

    def _check_prefix(self, prefix: Sequence[int], max_tokens: int, request_id: str) -> None:
        if self._broken:
            raise EngineError(f"{self._broken}: write all weights (Engine.update_weights_by) before sampling")
        if not prefix or max_tokens < 1:
            raise EngineError(f"request {request_id!r}: needs at least one token before and one to sample")
        if len(prefix) + max_tokens > self.max_model_len:
            raise EngineError(
                f"request {request_id!r}: {len(prefix)} + {max_tokens} tokens exceed the engine's window of "
                f"{self.max_model_len} (data.max_prompt_len + rollout.max_response_len)"
            )
        if not 0 <= min(prefix) <= max(prefix) < self.vocab_size:
            raise EngineError(f"request {request_id!r}: token ids must be in [0, {self.vocab_size})")
