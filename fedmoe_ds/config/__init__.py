"""The configuration of a run: the tree of its keys, loading it from YAML, and the reference of all keys."""

from fedmoe_ds.config.adapters_section import AdapterConfig, MoEAdapterConfig
from fedmoe_ds.config.data_section import DataConfig, PartitionConfig
from fedmoe_ds.config.deepspeed_section import checked_deepspeed_section
from fedmoe_ds.config.devices_section import TARGETS, DevicesConfig, ProfileConfig
from fedmoe_ds.config.evaluation_section import CheckpointConfig, EvaluationConfig
from fedmoe_ds.config.foundation_section import FoundationConfig, PretrainConfig
from fedmoe_ds.config.idle import idle_keys
from fedmoe_ds.config.loading import config_of, dump_config, load_config, with_overrides
from fedmoe_ds.config.local_section import LocalConfig
from fedmoe_ds.config.reference import config_schema_markdown
from fedmoe_ds.config.schema import (
    Config,
    ExecutionConfig,
    FederationConfig,
    MethodConfig,
    TierConfig,
    TopologyConfig,
)
from fedmoe_ds.config.section import Section
from fedmoe_ds.config.server_section import ServerConfig
from fedmoe_ds.config.shipped import find_config

__all__ = [
    "TARGETS",
    "AdapterConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DevicesConfig",
    "EvaluationConfig",
    "ExecutionConfig",
    "FederationConfig",
    "FoundationConfig",
    "LocalConfig",
    "MethodConfig",
    "MoEAdapterConfig",
    "PartitionConfig",
    "PretrainConfig",
    "ProfileConfig",
    "Section",
    "ServerConfig",
    "TierConfig",
    "TopologyConfig",
    "checked_deepspeed_section",
    "config_of",
    "config_schema_markdown",
    "dump_config",
    "find_config",
    "idle_keys",
    "load_config",
    "with_overrides",
]
