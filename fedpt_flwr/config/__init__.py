"""The run config: flat keys as Flower carries them, parsed once into frozen dataclasses.

``parse_run_config`` checks names, types, ranges and contradictions and reports everything that is wrong at once. What
depends on files, models or Flower (does the folder exist? is there such a strategy?) is checked by the modules that
know them.

    keys             every key: its default, meaning and rule
    contradictions   keys that are fine one by one and not together
    parsing          from flat keys and back
"""

from __future__ import annotations

from fedpt_flwr.config.keys import (
    AUTO,
    CHOICE_LENGTHS,
    DATA_FORMATS,
    DISTILLATION_MODES,
    DP_MODES,
    INNER_STRATEGIES,
    LORA_AGGREGATIONS,
    NEED_SINGLE_UPDATES,
    PLAIN_MEANS,
    SAMPLINGS,
    SCORED_ROWS,
    SECURE_SUM_DEVICES,
    SECURE_SUM_WIDTHS,
    DataConfig,
    DistillationConfig,
    ModelConfig,
    PrivacyConfig,
    ProxyConfig,
    RemoteConfig,
    RunConfig,
    Scalar,
    ScoringConfig,
    StopConfig,
    StrategyConfig,
    ThreadsConfig,
    TrainConfig,
    TuningConfig,
    WireConfig,
)
from fedpt_flwr.config.parsing import (
    Setting,
    examine_run_config,
    flat_values,
    parse_run_config,
    settings,
    settings_markdown,
    toml_of,
)

__all__ = [
    "AUTO",
    "CHOICE_LENGTHS",
    "DATA_FORMATS",
    "DISTILLATION_MODES",
    "DP_MODES",
    "INNER_STRATEGIES",
    "LORA_AGGREGATIONS",
    "NEED_SINGLE_UPDATES",
    "PLAIN_MEANS",
    "SAMPLINGS",
    "SCORED_ROWS",
    "SECURE_SUM_DEVICES",
    "SECURE_SUM_WIDTHS",
    "DataConfig",
    "DistillationConfig",
    "ModelConfig",
    "PrivacyConfig",
    "ProxyConfig",
    "RemoteConfig",
    "RunConfig",
    "Scalar",
    "ScoringConfig",
    "Setting",
    "StopConfig",
    "StrategyConfig",
    "ThreadsConfig",
    "TrainConfig",
    "TuningConfig",
    "WireConfig",
    "examine_run_config",
    "flat_values",
    "parse_run_config",
    "settings",
    "settings_markdown",
    "toml_of",
]
