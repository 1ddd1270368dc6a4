"""The inner strategy: one of Flower's, made as a config says, and what it carries from round to round."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from numpy.typing import NDArray

from fedpt_flwr.config import INNER_STRATEGIES, StrategyConfig
from fedpt_flwr.errors import ConfigError, RunError

FOLDED = (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi)
"""Strategies that see no more of the replies than their weighted mean."""

WEIGHT = "num-examples"
"""The metric by which replies are weighted."""

_OURS = ("fraction_train", "fraction_evaluate", "min_train_nodes", "min_evaluate_nodes", "min_available_nodes")


def make_inner_strategy(config: StrategyConfig) -> Strategy:
    """Build the Flower strategy that a config names; FedPT does the sampling, so it takes every device it is shown.

    Raises:
        ConfigError: The strategy does not take these arguments.
    """
    cls = getattr(flower_strategies, config.name)
    accepted = sorted(set(inspect.signature(cls).parameters) - {*_OURS, "self"} - set(_record_keys(cls)))
    arguments = config.parsed_arguments()
    for name, value in arguments.items():
        if name in _OURS:
            raise ConfigError(
                f"{name} is set by this app",
                place="strategy.arguments",
                remedy="use fraction-train, min-devices and min-replies",
            )
        if name not in accepted:
            raise ConfigError(
                f"{config.name} takes no argument {name} here",
                place="strategy.arguments",
                remedy=f"it takes {', '.join(accepted) or 'none'}",
            )
        if isinstance(value, bool) or not isinstance(value, int | float):  # all that they take are numbers
            raise ConfigError(f"{name} must be a number", value=value, place="strategy.arguments")
    if config.name == "FedProx" and "proximal_mu" not in arguments:
        arguments["proximal_mu"] = 0.0
    try:
        with flower_is_quiet():  # it warns that evaluation on devices is off; here that is meant
            strategy: Strategy = cls(
                fraction_train=1.0,
                fraction_evaluate=0.0,
                min_train_nodes=1,
                min_evaluate_nodes=0,
                min_available_nodes=1,
                **arguments,
            )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.name} refuses its arguments ({error})", place="strategy.arguments") from error
    return strategy


@contextmanager
def flower_is_quiet() -> Iterator[None]:
    """Keep what Flower logs from users to whom it says nothing."""
    flower_log = logging.getLogger("flwr")
    flower_log.disabled = True
    try:
        yield
    finally:
        flower_log.disabled = False


def is_folded(strategy: Strategy) -> bool:
    """Whether a strategy, as it is set, sees no more of the replies than their weighted mean."""
    return (
        type(strategy) in FOLDED
        and isinstance(strategy, FedAvg)
        and strategy.weighted_by_key == WEIGHT
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )


def _record_keys(cls: type) -> list[str]:
    names = inspect.signature(cls).parameters
    return [name for name in names if name.endswith(("_key", "_fn"))]


def inner_state(strategy: Strategy) -> dict[str, NDArray[Any]]:
    """What a strategy carries from one round into the next, besides the arrays that it sends.

    Args:
        strategy: One that ``strategy.name`` can name; of any other nothing is known.

    Returns:
        Arrays by flat names such as ``m_t/<name of an array>``, in the types in which the strategy computes. Empty for
        a strategy that carries nothing, and before the first round. They are the strategy's own: not to be written to.
    """
    state: dict[str, NDArray[Any]] = {}
    for field, value in carried(strategy).items():
        if isinstance(strategy, FedAvgM) and value is not None:  # a list, in the order of these
            value = dict(zip(strategy.current_arrays or (), value, strict=True))
        for name, part in (value or {}).items():
            state[f"{field}/{name}"] = np.asarray(part, order="C")  # safetensors writes memory as it lies
    return state


def set_inner_state(strategy: Strategy, state: Mapping[str, NDArray[Any]], arrays: ArrayRecord) -> None:
    """Give a new strategy what :func:`inner_state` took from another after a complete round.

    Args:
        strategy: One that ``strategy.name`` can name, made with the same arguments.
        state: What was saved; it is not trusted.
        arrays: Those that the next round sends: the state has the same names and shapes.

    Raises:
        ConfigError: The strategy is none that can be resumed.
        RunError: Names, shapes or types are not those of this strategy and these arrays, or a value is not finite.
    """
    name = type(strategy).__name__
    if name not in INNER_STRATEGIES:
        raise ConfigError(
            "what this strategy remembers from round to round cannot be saved",
            value=name,
            place="strategy.name",
            remedy=f"a run can be resumed with {', '.join(INNER_STRATEGIES)}",
        )
    fields = tuple(carried(strategy))
    shapes = {f"{field}/{name}": tuple(array.shape) for field in fields for name, array in arrays.items()}
    if state.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - state.keys()), sorted(state.keys() - shapes.keys())
        raise RunError(
            f"the saved state of {type(strategy).__name__} must hold {len(shapes)} arrays",
            value=f"{len(missing)} missing {missing[:1]}, {len(extra)} unknown {extra[:1]}",
            remedy="was it saved with other strategy.arguments?",
        )
    for name, shape in shapes.items():
        _check_state(name, state[name], shape)
    for field in fields:
        parts = {name: state[f"{field}/{name}"] for name in sorted(arrays)}  # FedPT sends them in this order
        setattr(strategy, field, list(parts.values()) if isinstance(strategy, FedAvgM) else parts)


def carried(strategy: Strategy) -> dict[str, Any]:
    """The attributes that a strategy reads in a round and wrote in an earlier one; None before it has.

    ``current_arrays`` is none of them: it is what the round sends, see
    :meth:`~fedpt_flwr.strategy.FedPT.configure_train`.
    """
    if isinstance(strategy, FedAvgM) and strategy.server_momentum > 0:
        return {"momentum_vector": strategy.momentum_vector}
    if isinstance(strategy, FedAdagrad | FedAdam | FedYogi):
        return {"m_t": strategy.m_t, "v_t": strategy.v_t}
    return {}


def _check_state(name: str, value: NDArray[Any], shape: tuple[int, ...]) -> None:
    if value.dtype not in (np.float32, np.float64):
        rule, found = "must be float32 or float64", value.dtype.name
    elif value.shape != shape:
        rule, found = f"must have shape {shape}", str(value.shape)
    elif not np.isfinite(value).all():
        rule, found = "must be finite numbers", f"{int((~np.isfinite(value)).sum())} that are not"
    else:
        return
    raise RunError(f"the strategy's saved {name} {rule}", value=found, remedy="is the checkpoint damaged?")
