"""Configuration: sections of keys, reading and writing (`load`), derived values (`derive`), joint rules (`rules`)."""

from treepo_mega.config.debug import DebugConfig, FaultConfig
from treepo_mega.config.environment import EnvironmentConfig
from treepo_mega.config.load import (
    ConfigError,
    batch_invariant,
    check,
    data_parallel_size,
    dump_config,
    dump_text,
    load_config,
    parse_config,
    section_in,
)
from treepo_mega.config.model import CanaryConfig, ModelConfig, ParallelConfig, ReshardConfig
from treepo_mega.config.rollout import (
    BranchingConfig,
    BudgetConfig,
    EngineConfig,
    FallbackConfig,
    RolloutConfig,
    SegmentConfig,
    StopConfig,
)
from treepo_mega.config.root import Config
from treepo_mega.config.run import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    EvalConfig,
    LoggingConfig,
    PromptSource,
    RewardConfig,
    RewardFunction,
    RewardServer,
)
from treepo_mega.config.section import Section
from treepo_mega.config.training import AlgoConfig, GuardConfig, LossConfig, TrainConfig

__all__ = [
    "AlgoConfig",
    "BranchingConfig",
    "BudgetConfig",
    "CanaryConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DebugConfig",
    "DistributedConfig",
    "EngineConfig",
    "EnvironmentConfig",
    "EvalConfig",
    "FallbackConfig",
    "FaultConfig",
    "GuardConfig",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "ParallelConfig",
    "PromptSource",
    "ReshardConfig",
    "RewardConfig",
    "RewardFunction",
    "RewardServer",
    "RolloutConfig",
    "Section",
    "SegmentConfig",
    "StopConfig",
    "TrainConfig",
    "batch_invariant",
    "check",
    "data_parallel_size",
    "dump_config",
    "dump_text",
    "load_config",
    "parse_config",
    "section_in",
]
