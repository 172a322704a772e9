"""Every option of a run, once: one typed tree, a file a subject, read from a YAML recipe and dotted overrides.

The text under a field is its documentation (`dapo-megatron config --explain` prints it). Sections import nothing but
their base; `run` puts them together and checks what concerns more than one.
"""

from dapo_megatron.config.actor import ActorConfig, OptimizerConfig, PrecisionConfig
from dapo_megatron.config.algorithm import AlgorithmConfig
from dapo_megatron.config.checkpoint import CheckpointConfig
from dapo_megatron.config.data import DataConfig
from dapo_megatron.config.engines import EngineConfig
from dapo_megatron.config.grading import GradingConfig
from dapo_megatron.config.launch import LaunchConfig
from dapo_megatron.config.load import load_config, parse_config
from dapo_megatron.config.model import ModelConfig
from dapo_megatron.config.observe import ObserveConfig
from dapo_megatron.config.resharding import ReshardingConfig
from dapo_megatron.config.rollout import EvaluationConfig, RolloutConfig
from dapo_megatron.config.run import RunConfig
from dapo_megatron.config.trainer import TrainerConfig

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GradingConfig",
    "LaunchConfig",
    "ModelConfig",
    "ObserveConfig",
    "OptimizerConfig",
    "PrecisionConfig",
    "ReshardingConfig",
    "RolloutConfig",
    "RunConfig",
    "TrainerConfig",
    "load_config",
    "parse_config",
]
