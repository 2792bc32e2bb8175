"""The whole configuration: the sections in one tree, with a record of what was derived."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, PrivateAttr

from treepo_mega.config.debug import DebugConfig
from treepo_mega.config.derive import derive
from treepo_mega.config.environment import EnvironmentConfig
from treepo_mega.config.model import ModelConfig, ParallelConfig, ReshardConfig
from treepo_mega.config.rollout import RolloutConfig
from treepo_mega.config.run import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LoggingConfig,
    RewardConfig,
)
from treepo_mega.config.section import Section
from treepo_mega.config.training import AlgoConfig, LossConfig, TrainConfig


class Config(Section):
    """A run."""

    preset: Literal["treepo_paper", "fair_trees", "entropy_trees"] | None = None
    """Named setting of sampling, credit and training (docs/guides/algorithms.md). A key that is written wins."""
    model: ModelConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    environment: EnvironmentConfig = Field(default_factory=EnvironmentConfig)
    reshard: ReshardConfig = Field(default_factory=ReshardConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    algo: AlgoConfig = Field(default_factory=AlgoConfig)
    loss: LossConfig = Field(default_factory=LossConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    debug: DebugConfig = Field(default_factory=DebugConfig)

    _derived: dict[str, Any] = PrivateAttr(default_factory=dict)

    def model_post_init(self, _: Any) -> None:
        """Fill in what follows from other keys, and tell sampling about the switches that concern it."""
        self.rollout = self.rollout.with_debug(self.debug)
        self._derived = derive(self)

    @property
    def derived(self) -> Mapping[str, Any]:
        """Dotted keys that were left at null, with the values that follow from other keys."""
        return MappingProxyType(self._derived)

    def as_set(self) -> dict[str, Any]:
        """The configuration as plain values with null where a value was derived; `parse_config` gives an equal one."""
        values = self.model_dump(mode="json", by_alias=True)
        for key in self._derived:
            *sections, name = key.split(".")
            section = values
            for part in sections:
                section = section[part]
            section[name] = None
        return values

    @property
    def needs_reference(self) -> bool:
        """Whether the frozen policy of a KL term is built, for the loss or for the reward."""
        return self.algo.kl_loss_coef > 0 or self.reward.kl_coef > 0

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt, response and observations: the engine's window."""
        return self.data.max_prompt_len + self.rollout.max_response_len + self.max_observation_len

    @property
    def max_observation_len(self) -> int:
        """Tokens of the observations of a trajectory at most; 0 without an environment."""
        return self.environment.max_observation_len if self.data.environment is not None else 0
