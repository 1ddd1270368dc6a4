"""Flower's accountant against two computations of our own, and what is made of it."""

import math
import sys

import pytest

from fedpt_flwr.accounting import (
    copy_of,
    epsilon_after,
    new_accountant,
    noise_for,
    privacy_outlook,
    release,
    releases_within,
    spent,
)
from fedpt_flwr.config import PrivacyConfig
from fedpt_flwr.errors import ConfigError

CASES = [
    (noise, releases, delta) for noise in (0.5, 1.0, 3.0, 11.0) for releases in (1, 8, 100) for delta in (1e-5, 1e-8)
]


def exact_epsilon(noise, releases, delta):
    """Of releases of Gaussian noise exactly (Balle and Wang 2018, theorem 8): together they are one of mu = sqrt(T)/z.

    delta(epsilon) = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)
    """
    mu = math.sqrt(releases) / noise

    def phi(x):
        return math.erfc(-x / math.sqrt(2)) / 2

    def delta_of(epsilon):
        return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)

    low, high = 0.0, 1.0
    while delta_of(high) > delta and high < 600:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def renyi_epsilon(noise, releases, delta, orders):
    """By Rényi divergences T a / (2 z^2) and the conversion of Canonne, Kamath and Steinke 2020, proposition 12."""
    return min(
        releases * order / (2 * noise**2) + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        for order in orders
    )


@pytest.mark.parametrize(("noise", "releases", "delta"), CASES)
def test_epsilon_is_what_the_renyi_divergences_of_gaussian_noise_give(noise, releases, delta):
    accountant = new_accountant(delta=delta, population=10)
    orders = accountant.state_dict()["orders"]
    assert epsilon_after(noise, releases, delta=delta) == pytest.approx(
        renyi_epsilon(noise, releases, delta, orders), rel=1e-6
    )


@pytest.mark.parametrize(("noise", "releases", "delta"), [case for case in CASES if case[1] / case[0] ** 2 < 500])
def test_epsilon_is_never_below_the_exact_one_and_not_far_above(noise, releases, delta):
    exact, told = exact_epsilon(noise, releases, delta), epsilon_after(noise, releases, delta=delta)
    assert exact <= told <= 1.25 * exact


def test_the_exact_computation_knows_a_value_from_the_literature():
    # One release with mu = 1 (z = 1): delta(1) = Phi(-1/2) - e Phi(-3/2) = 0.30854 - 2.71828 * 0.06681 = 0.12694
    assert exact_epsilon(1.0, 1, 0.12694) == pytest.approx(1.0, abs=1e-3)


def test_nothing_released_costs_nothing():
    assert epsilon_after(1.0, 0, delta=1e-5) == 0.0
    assert spent(new_accountant(delta=1e-5, population=3)) == {"epsilon": 0.0, "delta": 1e-5, "releases": 0}


@pytest.mark.parametrize("budget", [0.5, 1, 8, 200])
@pytest.mark.parametrize("releases", [1, 8])
def test_the_noise_for_a_budget_keeps_to_it_and_is_hardly_more_than_needed(budget, releases):
    noise = noise_for(budget, releases, delta=1e-5)
    assert epsilon_after(noise, releases, delta=1e-5) <= budget
    assert epsilon_after(0.99 * noise, releases, delta=1e-5) > budget


def test_a_budget_allows_as_many_rounds_as_stay_within_it():
    for budget in (5.0, 8.0, 20.0):
        allowed = releases_within(budget, 1.0, delta=1e-5, most=50)
        assert epsilon_after(1.0, allowed, delta=1e-5) <= budget < epsilon_after(1.0, allowed + 1, delta=1e-5)
    assert releases_within(1e6, 1.0, delta=1e-5, most=50) == 50
    assert releases_within(0.1, 1.0, delta=1e-5) == 0


def test_what_is_counted_does_not_depend_on_how_many_devices_train():
    """Who trains follows from the seed, so being left out of a round hides nothing."""
    few, all_ = (new_accountant(delta=1e-5, population=100) for _ in range(2))
    few.compose(release(1.0, sampled=1, population=100))
    all_.compose(release(1.0, sampled=100, population=100))
    assert spent(few) == spent(all_)


def test_a_copy_has_seen_the_same_and_goes_on_by_itself():
    accountant = new_accountant(delta=1e-5, population=4, max_epsilon=9.0)
    accountant.compose(release(2.0, sampled=4, population=4), 3)
    copy = copy_of(accountant)
    assert copy.state_dict() == accountant.state_dict()
    copy.compose(release(2.0, sampled=4, population=4))
    assert (spent(copy)["releases"], spent(accountant)["releases"]) == (4, 3)


def test_the_outlook_says_what_the_rounds_cost_and_what_the_budget_allows():
    config = PrivacyConfig(dp="server-fixed", noise_multiplier=1.0)
    (line,) = privacy_outlook(config, 8)
    assert line == (
        "Private (server-fixed): 8 rounds at noise multiplier 1 cost each device epsilon 16.51 at delta 1e-05"
    )
    config = PrivacyConfig(dp="server-fixed", noise_multiplier=1.0, max_epsilon=8.0)
    _, line = privacy_outlook(config, 8)
    assert line.startswith("The budget of epsilon 8 allows 2 rounds in all, and the run ends after them")
    needed = float(line.split("privacy.noise-multiplier=")[1].split()[0])
    assert len(privacy_outlook(PrivacyConfig(dp="server-fixed", noise_multiplier=needed, max_epsilon=8.0), 8)) == 1


def test_a_budget_that_allows_no_round_is_refused_with_the_noise_that_would_do():
    config = PrivacyConfig(dp="server-fixed", noise_multiplier=1.0, max_epsilon=1.0)
    with pytest.raises(ConfigError) as raised:
        privacy_outlook(config, 8)
    assert str(raised.value) == (
        "privacy.max-epsilon: the budget must allow at least one round, and one costs epsilon 4.729, got 1.0; set "
        f"privacy.noise-multiplier={noise_for(1.0, 8, delta=1e-5):g}, with which it allows all 8"
    )


def test_without_the_accountant_a_private_run_is_refused_with_the_line_to_type(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "dp_accounting"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"privacy.dp: .* not installed; .* pip install 'fedpt-flwr\[dp\]'"):
        new_accountant(delta=1e-5, population=2)
