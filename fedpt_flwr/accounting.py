"""What privacy costs: epsilon after so many rounds, and the noise that a budget asks for.

Epsilon is Flower's accountant's (Rényi differential privacy, of Google's ``dp-accounting``, extra ``flwr[dp]``), for
Gaussian noise without amplification by sampling. It is about devices, not about examples: whether a device with all
that it holds took part or not. A device that did not take part counts as one whose change is zero.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flwr.serverapp import GaussianPrivacyEvent, NeighboringRelation, SamplingMethod
from flwr.serverapp import PrivacyConfig as FlowerPrivacyConfig

from fedpt_flwr.config import PrivacyConfig
from fedpt_flwr.errors import ConfigError

if TYPE_CHECKING:
    from flwr.serverapp import RdpAccountant

_MOST_RELEASES = 1_000_000
_TOLERANCE = 1e-3  # relative, of the noise that a budget asks for; always on the safe side


def new_accountant(*, delta: float, population: int, max_epsilon: float | None = None) -> RdpAccountant:
    """Flower's accountant, with nothing spent.

    Args:
        delta: At which epsilon is told.
        population: How many devices there are.
        max_epsilon: Budget; None for no limit.

    Raises:
        ConfigError: The package that it needs is not installed.
    """
    from flwr.serverapp import RdpAccountant  # Flower imports the optional package with it

    try:
        return RdpAccountant(
            FlowerPrivacyConfig(
                target_delta=delta,
                population_size=population,
                neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
                sampling_method=SamplingMethod.NO_AMPLIFICATION,
                max_epsilon=max_epsilon,
            )
        )
    except ImportError as error:
        raise ConfigError(
            "a private run needs the accountant, which is not installed",
            place="privacy.dp",
            remedy="install it where the ServerApp runs: pip install 'fedpt-flwr[dp]'",
        ) from error


def release(noise_multiplier: float, *, sampled: int, population: int) -> GaussianPrivacyEvent:
    """One round's noisy mean, as the accountant counts it.

    Args:
        noise_multiplier: Standard deviation of the noise on the sum, as a multiple of the norm.
        sampled: Devices that train in the round.
        population: How many devices there are.
    """
    return GaussianPrivacyEvent(noise_multiplier=noise_multiplier, sample_size=sampled, population_size=population)


def copy_of(accountant: RdpAccountant) -> RdpAccountant:
    """An accountant that has seen the same."""
    config = accountant.config
    copy = new_accountant(delta=config.target_delta, population=config.population_size, max_epsilon=config.max_epsilon)
    copy.load_state_dict(accountant.state_dict())
    return copy


def epsilon_after(noise_multiplier: float, releases: int, *, delta: float) -> float:
    """Epsilon of so many rounds; 0 of none.

    Args:
        noise_multiplier: Of each round.
        releases: Number of rounds.
        delta: At which epsilon is told.
    """
    if releases == 0:
        return 0.0
    accountant = new_accountant(delta=delta, population=1)
    accountant.compose(release(noise_multiplier, sampled=1, population=1), releases)
    return accountant.get_epsilon(delta)


def releases_within(max_epsilon: float, noise_multiplier: float, *, delta: float, most: int = _MOST_RELEASES) -> int:
    """How many rounds a budget allows, at most ``most``.

    Args:
        max_epsilon: The budget.
        noise_multiplier: Of each round.
        delta: At which epsilon is told.
        most: Number of rounds beyond which nobody asks.
    """
    low, high = 0, most + 1  # `low` rounds fit, `high` do not, or are more than asked for
    while high - low > 1:
        middle = (low + high) // 2
        fits = epsilon_after(noise_multiplier, middle, delta=delta) <= max_epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low


def noise_for(max_epsilon: float, releases: int, *, delta: float) -> float:
    """The smallest noise multiplier with which so many rounds stay within a budget, a little rounded up.

    Args:
        max_epsilon: The budget, above 0.
        releases: Number of rounds, at least 1.
        delta: At which epsilon is told.
    """
    low, high = 0.0, 1.0
    while epsilon_after(high, releases, delta=delta) > max_epsilon:
        low, high = high, 2 * high
    while high - low > _TOLERANCE * high:
        middle = (low + high) / 2
        fits = epsilon_after(middle, releases, delta=delta) <= max_epsilon
        low, high = (low, middle) if fits else (middle, high)
    step = 10.0 ** (math.floor(math.log10(high)) - 3)
    return round(math.ceil(high / step) * step, 12)


def spent(accountant: RdpAccountant) -> dict[str, Any]:
    """What an accountant says by now: ``epsilon``, ``delta`` and ``releases``."""
    if accountant.num_releases == 0:  # the backend would name a bound of its own for nothing at all
        return {"epsilon": 0.0, "delta": accountant.config.target_delta, "releases": 0}
    said = accountant.get_privacy_spent()
    return {"epsilon": said.epsilon, "delta": said.delta, "releases": said.num_releases}


def privacy_outlook(privacy: PrivacyConfig, num_rounds: int) -> list[str]:
    """What a run's rounds will cost and what its budget allows, in sentences, before any of them.

    Args:
        privacy: Of a run in which ``privacy.dp`` is not ``off``.
        num_rounds: Number of rounds.

    Raises:
        ConfigError: The budget does not allow a single round, or the accountant is not installed.
    """
    epsilon = epsilon_after(privacy.noise_multiplier, num_rounds, delta=privacy.delta)
    lines = [
        f"Private ({privacy.dp}): {num_rounds} rounds at noise multiplier {privacy.noise_multiplier:g} cost each "
        f"device epsilon {epsilon:.4g} at delta {privacy.delta:g}"
    ]
    if not privacy.max_epsilon or epsilon <= privacy.max_epsilon:
        return lines
    enough = noise_for(privacy.max_epsilon, num_rounds, delta=privacy.delta)
    fitting = releases_within(privacy.max_epsilon, privacy.noise_multiplier, delta=privacy.delta, most=num_rounds)
    if not fitting:
        first = epsilon_after(privacy.noise_multiplier, 1, delta=privacy.delta)
        raise ConfigError(
            f"the budget must allow at least one round, and one costs epsilon {first:.4g}",
            value=privacy.max_epsilon,
            place="privacy.max-epsilon",
            remedy=f"set privacy.noise-multiplier={enough:g}, with which it allows all {num_rounds}",
        )
    return [
        *lines,
        f"The budget of epsilon {privacy.max_epsilon:g} allows {fitting} rounds in all, and the run ends after them; "
        f"privacy.noise-multiplier={enough:g} would allow all {num_rounds}",
    ]
