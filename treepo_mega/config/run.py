"""A run around its training: data, grading, checkpoints, evaluation, logs and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from treepo_mega.config.section import Section
from treepo_mega.config.source import FunctionPath, expand_path


class PromptSource(Section):
    """Where prompts come from: files, or a reasoning-gym task. Exactly one of `path` and `reasoning_gym`."""

    path: str | list[str] | None = None
    """A .jsonl, .json or .parquet file (also with .gz or .zst), a glob, a directory of shards, a Hub data set such as
    openai/gsm8k, or a list of them. `path@[a:b]` takes rows a to b; `~` and `$VAR` are expanded."""
    subset: str | None = None
    """Of a Hub data set: the name that the Hub calls subset or config."""
    split: str = "train"
    """Of a Hub data set: its split."""
    weight: float | None = Field(None, gt=0)
    """Share of the training prompts that this source gives, relative to the other sources' weights; set it for all
    sources or for none. None: every prompt comes once an epoch."""
    reasoning_gym: str | None = None
    """Name of a reasoning-gym dataset, such as chain_sum."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the reasoning-gym dataset."""
    size: int = Field(512, ge=1)
    """Items to draw from a reasoning-gym task."""
    seed: int = Field(0, ge=0, lt=2**32)
    verifier: str | None = None
    """Overrides data.verifier for this source."""

    @property
    def paths(self) -> list[str]:
        """`path` as a list; empty for a reasoning-gym source."""
        if self.path is None:
            return []
        return [self.path] if isinstance(self.path, str) else self.path


class DataConfig(Section):
    """Prompts and how to read them."""

    train: list[PromptSource] = Field(min_length=1)
    eval: list[PromptSource] = Field(default_factory=list)
    input_key: str = "prompt"
    """Key of the prompt, dots reach inside; with the default, messages, question, problem, input, instruction, query
    and conversations are tried too."""
    label_key: str = "answer"
    """Key of the ground truth; with the default, label, ground_truth, reward_model.ground_truth, final_answer,
    expected_answer and solution are tried too."""
    reference_key: str = "solution"
    """Key of a reference text (a worked solution), whose perplexity under the actor is reported at evaluation; with the
    default, target and completion are tried too, and an answer in GSM8K's form (`reasoning`, then `#### 42`). verl's
    GSM8K files have it in extra_info.answer. Rows without one are left out."""
    apply_chat_template: bool = False
    """Wrap the prompt with the tokenizer's chat template (a list of messages is always wrapped)."""
    chat_template: str | None = None
    """File with a Jinja chat template, in place of the tokenizer's; `~` and `$VAR` are expanded."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables handed to the chat template, such as {enable_thinking: false}; the template has to mention them."""
    system_prompt: str | None = None
    prompt_suffix: str = ""
    """Text appended to every prompt before the template, such as an answer-format instruction."""
    environment: str | None = None
    """What answers turns of the policy: path/to/file.py:Class, a function or a list of functions there, or calculator,
    python, search, guess or game. The section environment bounds it. null: a response is one turn."""
    verifier: str = "math"
    """math | boxed | last_number | exact | countdown | reasoning_gym | path/to/file.py:function (verl's compute_score,
    which may be async) | http:NAME of reward.servers | environment (its own get_reward).
    A source's own verifier comes first; reasoning_gym sources without one use reasoning_gym."""
    max_prompt_len: int = Field(1024, ge=1)
    """Longer prompts are dropped, counted and reported. Tokens."""
    drop_duplicates: bool = False
    """Keep only the first of the prompts that have the same text, answer and verifier."""
    shuffle: bool = True

    @field_validator("chat_template")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return value if value is None else expand_path(value)


class OverlongConfig(Section):
    """DAPO's soft penalty of long responses: min(-(tokens - (max_response_len - buffer_len)) / buffer_len * penalty, 0)
    is added to the reward."""

    buffer_len: int = Field(0, ge=0)
    """Tokens before rollout.max_response_len in which the reward falls. 0: no penalty."""
    penalty: float = Field(1.0, gt=0)
    """What a response of rollout.max_response_len tokens loses."""


class RewardFunction(Section):
    """A part of a reward that is a weighted sum."""

    verifier: str | None = None
    """As data.verifier. None: the prompt's own."""
    weight: float = 1.0
    """What its score is multiplied by; 0: it is only logged."""
    name: str | None = Field(None, min_length=1, pattern=r"^[\w@-]+$")
    """Its metric is reward/<name>. None: the verifier's or the function's name; answer for the prompt's own."""

    @property
    def label(self) -> str:
        """The name that its metric has.

        >>> RewardFunction(verifier="rewards/mine.py:style").label
        'style'
        """
        return self.name or (self.verifier or "answer").rpartition(":")[2]


class RewardServer(Section):
    """A reward over HTTP: a judge model or a reward server. `http:<name>` names it where a verifier is named."""

    name: str = Field(pattern=r"^[\w-]+$")
    """What stands behind `http:`."""
    url: str
    """Where answers are sent by POST, as docs/guides/remote-rewards.md says. http or https."""
    timeout_s: float = Field(30.0, gt=0)
    """Deadline of one request, from the connection to the last byte of the reply."""
    retries: int = Field(3, ge=0)
    """Further tries of a request that had no answer, or 408, 425, 429 or 5xx."""
    backoff_s: float = Field(0.5, ge=0)
    """Wait before the first retry; it doubles each time, and a Retry-After of the server counts where it is longer."""
    deadline_s: float = Field(300.0, gt=0)
    """Of an answer, all waits and tries together, from when it is handed to the graders. Then it is lost."""
    in_flight: int = Field(64, ge=1, le=4096)
    """Requests that one rank has open."""
    batch_size: int = Field(1, ge=1, le=1024)
    """Most answers in one request."""
    token_env: str | None = Field(None, pattern=r"^[A-Za-z_]\w*$")
    """Environment variable with the token that is sent as `Authorization: Bearer`. No other worker sees it."""
    cache_entries: int = Field(100_000, ge=0)
    """Scores that a rank remembers by content: equal answers to a prompt are asked once. 0: none."""
    cache_dir: str | None = Field(None, min_length=1)
    """Directory where scores are kept for later runs, and shared by ranks that start later. None: memory alone."""

    @field_validator("url")
    @classmethod
    def _has_no_secret(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            host, port, user = parts.hostname, parts.port, parts.username
        except ValueError as error:
            raise ValueError(f"expected a URL such as http://localhost:8000/score: {error}") from None
        if user is not None or parts.password is not None:
            # Not `value`: the message would show the password.
            raise ValueError(f"expected no user or password in the URL of {host}; name a variable in token_env")
        if parts.scheme not in ("http", "https") or not host or port == 0:
            raise ValueError(f"expected a URL such as http://localhost:8000/score, got {value!r}")
        return value

    @field_validator("cache_dir")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return value if value is None else expand_path(value)


class RewardConfig(Section):
    """Grading, in killable worker processes, and what becomes of the scores."""

    num_workers: int = Field(1, ge=1)
    """Grader processes per rank."""
    timeout_s: float = Field(10.0, gt=0)
    """Deadline of one grading; a worker past it is killed, replaced and the sample counted as lost."""
    max_chars: int = Field(20_000, ge=16)
    """Longer responses are graded by their last max_chars characters."""
    in_flight: int = Field(64, ge=1, le=4096)
    """Calls of an `async def` reward that one rank has open. They share one worker process and its event loop."""
    servers: list[RewardServer] = Field(default_factory=list)
    """Rewards over HTTP, each named by `http:<name>` in data.verifier, a source's verifier or reward.functions."""
    startup_timeout_s: float = Field(120.0, gt=0)
    """Deadline of starting a worker and importing its verifier (math-verify and reasoning-gym take seconds)."""
    memory_mb: int = Field(4096, ge=256)
    """Address space of one worker, MiB; an allocation beyond it fails and the sample counts as lost."""
    on_lost: Literal["drop"] | float = "drop"
    """The reward of an answer whose verifier raised, hung or died. drop: its leaf leaves the tree. A number: that, so
    that answers which kill graders are not spared. reward/lost counts them either way."""
    functions: list[RewardFunction] = Field(default_factory=list)
    """Several verifiers whose scores are added with weights, each logged as reward/<name>. The first says whether the
    answer is right, and evaluation looks at it alone. Empty: the prompt's own verifier is the reward."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of KL(actor || reference) in the reward: so many times the sum over a response of old logprob - reference
    logprob (nats) is taken off its reward before advantages. 0: none. In place of algo.kl_loss_coef, not beside it."""
    overlong: OverlongConfig = Field(default_factory=OverlongConfig)


class CheckpointConfig(Section):
    """Saving and resuming."""

    enabled: bool = True
    """false: nothing is saved, and nothing is resumed from `save`."""
    save: str | None = Field(None, min_length=1)
    """Directory of checkpoints. None: <run_dir>/checkpoints."""
    load: str | None = "auto"
    """auto: resume from the newest complete checkpoint under `save`, if any. latest: the same, and an error without
    any. A path: that checkpoint, or the newest complete one in it. null: start afresh. What is incomplete or damaged is
    passed over, with a word."""
    save_interval: int = Field(10, ge=1)
    keep_last: int = Field(2, ge=1)
    """The newest so many checkpoints stay; older ones are deleted when the next one is whole."""
    keep_every: int | None = Field(None, ge=1)
    """Beside them, checkpoints of steps that are a multiple of it stay for good. None: none do."""
    async_save: bool = False
    """Write checkpoints while training goes on, by a forked process of each rank. A step stops for the copy of weights
    and optimizer to host memory alone, which then holds them twice. A kill amid the write loses that checkpoint, and
    the one before it stays the newest."""
    save_hf: bool = False
    """Also export Hugging Face safetensors at the end of the run, under <run_dir>/hf."""

    @property
    def directory(self) -> Path:
        """`save` as a path; `derive` has filled it in when it was null."""
        assert self.save is not None, "a Config derives checkpoint.save"
        return Path(self.save)

    @property
    def seeks(self) -> bool:
        """Whether a start looks for the newest checkpoint under `save`."""
        return self.load in ("auto", "latest")

    @field_validator("save", "load")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return value if value is None else expand_path(value)


class EvalConfig(Section):
    """Evaluation on data.eval with the same engine."""

    interval: int = Field(0, ge=0)
    """Every that many rollout steps; 0: only where at_start and at_end say."""
    at_start: bool = False
    at_end: bool = False
    n_samples_per_prompt: int = Field(1, ge=1)
    temperature: float = Field(1.0, ge=0)
    greedy: bool = False
    """Also report greedy accuracy."""
    max_prompts: int | None = Field(None, ge=1)


class LoggingConfig(Section):
    """Where a run writes."""

    run_dir: str = "runs/default"
    tensorboard: bool = True
    trees_interval: int = Field(20, ge=0)
    """After step 1 and every that many steps trees are written to <run_dir>/trees/step_N.jsonl, one a line, for
    `treepo-mega tree`; 0: never."""
    trees_prompts: int | None = Field(16, ge=1)
    """Trees of the first so many prompts of such a step are written; null: all. A token takes about 30 bytes, once."""
    completions: int = Field(0, ge=0)
    """Leaves a step that are shown as a table on the console (rank 0): the best and the worst of a prompt; 0: none."""
    trace_steps: tuple[int, int] | None = None
    """[first, last]: of these steps, counted from 1, every rank writes its phases to <run_dir>/trace/rank_N.json, which
    chrome://tracing and ui.perfetto.dev open. None: never."""
    torch_profiler_steps: list[int] = Field(default_factory=list, max_length=16)
    """Of these steps, counted from 1, torch's profiler writes the training phases of every rank as Chrome traces to
    <run_dir>/profile/step_N/rank_R_PHASE.json.gz. At most 16: each may take hundreds of MB. The steps are slower."""
    phases_interval: int = Field(0, ge=0)
    """Every that many steps a table on the console (rank 0) shows where the time went: phases, and the engines' empty
    room by cause. 0: never."""
    sinks: list[Literal["tensorboard", "wandb", "mlflow", "swanlab", "trackio", "prometheus"] | FunctionPath] = Field(
        default_factory=list
    )
    """Where each step's metrics go as well: trackers by name, or a function of your own, path/to/file.py:function."""
    sinks_strict: bool = False
    """A sink that fails ends the run. Else it is warned of once and counted in logging/sink_failures."""
    sinks_offline: bool = False
    """wandb and swanlab write below run_dir alone, to be synced later."""
    project: str = "treepo_mega"
    """The project (experiment in MLflow) under which trackers file the run."""
    run_name: str | None = None
    """The run's name in trackers; null: the last part of run_dir."""
    price_per_gpu_hour: float | None = Field(None, ge=0)
    """Price of an hour of a GPU, in any currency: perf/cost is what the run has cost so far."""
    prometheus_port: int = Field(9400, ge=0, le=65535)
    """Port of the endpoint of the sink prometheus, on rank 0; 0: any free one, which the start names."""
    prometheus_address: str = "127.0.0.1"
    """Address of that endpoint; 0.0.0.0 lets other machines read it."""
    telemetry_interval_s: float = Field(2.0, ge=0)
    """Seconds between two looks at GPUs (NVML) and host by a thread of each node's first rank: gpu/ and host/ metrics.
    0: none."""
    status_interval_s: float = Field(2.0, ge=0)
    """Seconds between two looks of each rank at its own phase, for <run_dir>/status/rank_N.json and `treepo-mega top`;
    0: nothing is written."""
    progress: bool = True
    """Progress bars on the console (rank 0)."""

    @field_validator("trace_steps")
    @classmethod
    def _ascends(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError(f"expected [first, last] with 1 <= first <= last, got {list(value)}")
        return value

    @field_validator("torch_profiler_steps")
    @classmethod
    def _counts_from_one(cls, value: list[int]) -> list[int]:
        if any(step < 1 for step in value) or len(set(value)) < len(value):
            raise ValueError(f"expected different steps of at least 1, got {value}")
        return value

    @field_validator("run_dir")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        return value if value is None else expand_path(value)


class DistributedConfig(Section):
    """Processes and deadlines."""

    timeout_s: float = Field(600, gt=0)
    """Deadline of a collective or barrier, seconds."""
    hang_timeout_s: float | None = Field(None, gt=0)
    """A rank without a sign of progress for so long tells its phase and its Python stack, and ends the run. Seconds.
    None: a tenth more than the longest of timeout_s and rollout.timeout_s, and at least 30 s more."""
