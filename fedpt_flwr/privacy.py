"""Differential privacy of devices, on the server: Flower's own wrappers, counted, written down, and failing closed.

``FedPT(PrivateAverage(FedAvg))``: what devices send is clipped, averaged with equal weights, and Gaussian noise is
added (McMahan et al. 2018, arXiv:1710.06963; the norm that follows the devices: Andrew et al. 2021, arXiv:1905.03871).
All else, distillation and the proxy among it, is done with the noisy mean, and costs no privacy any more.

Flower's wrappers clip, average and account. Four things are otherwise here:

- Noise comes from the operating system's random numbers, not from NumPy's global generator: whoever knows the seed, or
  enough of the noise, must not be able to take the rest of it away.
- With a norm that follows the devices, Flower adds noise for the norm of the next round to changes that were clipped to
  this one's, and moves the norm away from its target: its bits say who was clipped, the paper's who was not. Both are
  put right, and those rounds are accounted for, which Flower does not do.
- Changes are measured, clipped and added in float64. Flower does so in the type of the arrays, and the norm of millions
  of float32 numbers summed in float32 is off by up to a thousandth: by so much a clipped change would be too long.
- A round is written down as spent before its noise is drawn, so that no process that is killed gives anything back.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import GaussianPrivacyEvent, Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
    Strategy,
)
from numpy.typing import NDArray

from fedpt_flwr.accounting import copy_of, epsilon_after, new_accountant, release, spent
from fedpt_flwr.bounds import norm
from fedpt_flwr.config import PrivacyConfig
from fedpt_flwr.errors import ConfigError, PrivacyError, RunError
from fedpt_flwr.records import in_type

if TYPE_CHECKING:
    from flwr.serverapp import RdpAccountant

_SHORTEST = 1e-5

NORM_BIT = "norm_bit"
"""The metric by which a device says whether its change was clipped; Flower's name."""

LEDGER = "privacy.json"
"""What a run has spent, in its folder; and in each checkpoint what it had spent by then."""


def system_normal(shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Standard normal numbers from the operating system's random numbers, float64 (Box and Muller).

    Args:
        shape: Of the array.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = np.frombuffer(secrets.token_bytes(16 * half), np.uint64).reshape(2, half) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((bits[0] + 1.0) * 2.0**-53))  # of a number from 2**-53 to 1, never 0
    angle = bits[1] * (2.0 * math.pi * 2.0**-53)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count].reshape(shape)


class _SystemNoise:
    """A wrapper of Flower's that draws its noise from the operating system."""

    noise_multiplier: float
    clipping_norm: float
    num_sampled_clients: int
    last_noise_stddev: float | None = None
    """Of the last round that had noise; its norm may have moved since."""

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on each weight of the mean."""
        return self.noise_multiplier * self.clipping_norm / self.num_sampled_clients

    def _add_noise_to_aggregated_arrays(self, aggregated: ArrayRecord) -> ArrayRecord:
        self.last_noise_stddev = self.noise_stddev
        # Added in float64 and rounded once: the last bits of a float32 sum would say something of its parts.
        return ArrayRecord(
            {
                name: Array(np.asarray(array.numpy() + self.noise_stddev * system_normal(array.shape), np.float32))
                for name, array in aggregated.items()
            }
        )


class _Following(_SystemNoise):
    """A norm that follows the devices, as the paper has it."""

    clip_norm_lr: float
    target_clipped_quantile: float
    clipped_count_stddev: float
    following_norm: float = 0.0
    """The norm of the next round, once this one's replies have been seen."""

    def _noisy_fraction(self, count: int, total: int) -> float:
        return (count + self.clipped_count_stddev * float(system_normal((1,))[0])) / total

    def _geometric_update(self, clipped_fraction: float) -> None:
        # Not yet: the noise of this round is for the norm that its changes were clipped to. A share outside 0 to 1 can
        # only be noise: followed all the way, a few devices' norm grew by orders of magnitude within rounds.
        share = min(max(clipped_fraction, 0.0), 1.0)
        self.following_norm = self.clipping_norm * math.exp(self.clip_norm_lr * (share - self.target_clipped_quantile))


class _ServerFixed(_SystemNoise, DifferentialPrivacyServerSideFixedClipping):
    pass


class _ClientFixed(_SystemNoise, DifferentialPrivacyClientSideFixedClipping):
    pass


class _ServerAdaptive(_Following, DifferentialPrivacyServerSideAdaptiveClipping):
    pass


class _ClientAdaptive(_Following, DifferentialPrivacyClientSideAdaptiveClipping):
    pass


Wrapper = _ServerFixed | _ClientFixed | _ServerAdaptive | _ClientAdaptive


def _compute_in_float64(wrapper: Wrapper, replies: Sequence[Message]) -> None:
    """Have Flower measure and add changes in float64: in float32 a clipped one is too long.

    It computes in the type of the arrays, and NumPy in the longer of two: it is enough that the model which changes are
    measured from is in float64, or, where devices clip, the first of the replies that are added up.
    """
    if isinstance(wrapper, _ServerFixed | _ServerAdaptive):
        wrapper.current_arrays = in_type(wrapper.current_arrays, "float64")
        return
    first = next(reply for reply in replies if reply.has_content())
    for name, record in list(first.content.array_records.items()):
        first.content[name] = in_type(record, "float64")


class PrivateAverage(Strategy):
    """The noisy mean of devices' changes, each of which counts the same.

    The first round settles who the devices are and how many of them train in a round; no later round may differ.

    Args:
        inner: A strategy whose ``aggregate_train`` is that of ``FedAvg``.
        config: Of a run in which ``privacy.dp`` is not ``off``.
        spend: Called with :meth:`to_json` of the time after a round, before that round's noise is drawn. What it
            raises stops the round.

    Attributes:
        devices: Numbers of the devices that have examples, in order; empty before the first round.
        sampled: How many of them train in a round.
    """

    def __init__(
        self, inner: FedAvg, config: PrivacyConfig, spend: Callable[[Mapping[str, Any]], None] = lambda _: None
    ) -> None:
        self.inner = inner
        self.config = config
        self.devices: tuple[int, ...] = ()
        self.sampled = 0
        self._spend = spend
        self._wrapper: Wrapper | None = None
        self._accountant: RdpAccountant | None = None

    # --- who takes part, and what is spent --------------------------------------------------------------------------

    def begin(self, devices: Sequence[int], sampled: int) -> None:
        """Settle who takes part, or make sure that it is as settled.

        Args:
            devices: Numbers of the devices that have examples.
            sampled: How many of them train in the round.

        Raises:
            ConfigError: Delta is too large for so few devices, the accountant is not installed, or Flower refuses what
                is set.
            PrivacyError: They are not the devices of the rounds before.
        """
        found = tuple(sorted(devices))
        if self._wrapper is None:
            self._settle(found, sampled)
        elif (found, sampled) != (self.devices, self.sampled):
            raise PrivacyError(
                f"a private run goes on with the {len(self.devices)} devices that it began with, {self.sampled} a "
                f"round; now there are {len(found)}, {sampled} a round",
                place="privacy.dp",
                remedy="bring back the devices that are missing and go on with resume; nothing was spent on this round",
            )

    def _settle(self, devices: tuple[int, ...], sampled: int) -> None:
        config = self.config
        if config.delta * len(devices) >= 1:
            raise ConfigError(
                f"delta must be below one over the number of devices, of which there are {len(devices)}; a larger one "
                "allows to publish all that one of them holds",
                value=config.delta,
                place="privacy.delta",
                remedy=f"set privacy.delta={10.0 ** math.floor(math.log10(0.1 / len(devices))):g}",
            )
        self._accountant = new_accountant(
            delta=config.delta, population=len(devices), max_epsilon=config.max_epsilon or None
        )
        try:
            self._wrapper = self._make_wrapper(sampled)
        except ValueError as error:
            # From half of it on Flower agrees, and adds noise without bound to make up for so little on the number.
            remedy = f"set privacy.clipped-count-stddev={config.noise_multiplier:g} or more, or let more devices train"
            raise ConfigError(
                f"with {sampled} devices a round Flower refuses this ({error})",
                place="privacy.noise-multiplier",
                remedy=remedy if config.is_adaptive else "see docs/privacy.md",
            ) from error
        self.devices, self.sampled = devices, sampled

    def _make_wrapper(self, sampled: int) -> Wrapper:
        config = self.config
        if not config.is_adaptive:
            fixed = _ClientFixed if config.clips_on_devices else _ServerFixed
            return fixed(
                self.inner, config.noise_multiplier, config.clipping_norm, sampled, accountant=self._accountant
            )
        adaptive = _ClientAdaptive if config.clips_on_devices else _ServerAdaptive
        return adaptive(
            self.inner,
            config.noise_multiplier,
            sampled,
            initial_clipping_norm=config.clipping_norm,
            target_clipped_quantile=config.clipped_share,
            clip_norm_lr=config.clipping_rate,
            clipped_count_stddev=config.clipped_count_stddev or None,
        )

    def affords_another(self) -> bool:
        """Whether one more round stays within the budget."""
        if not self.config.max_epsilon:
            return True
        releases = self.spent()["releases"] + 1
        return epsilon_after(self.config.noise_multiplier, releases, delta=self.config.delta) <= self.config.max_epsilon

    def spent(self) -> dict[str, Any]:
        """``epsilon`` and ``delta`` by now, of so many ``releases``."""
        if self._accountant is None:
            return {"epsilon": 0.0, "delta": self.config.delta, "releases": 0}
        return spent(self._accountant)

    @property
    def clipping_norm(self) -> float:
        """The norm that the next round's changes are clipped to."""
        return self.config.clipping_norm if self._wrapper is None else self._wrapper.clipping_norm

    @property
    def longest_reply(self) -> float | None:
        """The longest change that a device that clips may send; None where the server clips."""
        return self.clipping_norm if self.config.clips_on_devices else None

    @property
    def wants_norm_bits(self) -> bool:
        """Whether devices must say whether their change was clipped."""
        return self.config.clips_on_devices and self.config.is_adaptive

    def summary(self) -> None:
        """Log what the inner strategy is set to; what is private is logged by the run."""
        self.inner.summary()

    # --- a round ----------------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As Flower's wrapper does; a device that clips is told the norm.

        Raises:
            PrivacyError: The budget does not allow the round, or the norm is lost in rounding.
        """
        wrapper, _ = self._begun()
        if not self.affords_another():
            raise PrivacyError(
                "the budget does not allow another round",
                value=self.config.max_epsilon,
                place="privacy.max-epsilon",
                remedy=f"{self.spent()['releases']} rounds have cost epsilon {self.spent()['epsilon']:.4g}",
            )
        size = norm((name, array.numpy()) for name, array in arrays.items())
        if self.clipping_norm < _SHORTEST * size:
            raise PrivacyError(
                f"the clipping norm must be at least {_SHORTEST:g} times the weights' norm of {size:.4g}: rounded to "
                "float32, a shorter change is longer than it was clipped to",
                value=float(f"{self.clipping_norm:.4g}"),
                place="privacy.clipping-norm",
                remedy="raise it; nothing was spent on this round",
            )
        return wrapper.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Write the round down as spent, then clip, average and add noise.

        Raises:
            PrivacyError: A reply is missing or has another weight than the others. Then nothing is spent.
        """
        wrapper, accountant = self._begun()
        came = list(replies)
        self._check(came, server_round)
        _compute_in_float64(wrapper, came)
        after = copy_of(accountant)
        after.compose(self._release())
        self._spend(self._as_json(after))
        wrapper.last_noise_stddev = None
        try:
            arrays, metrics = wrapper.aggregate_train(server_round, came)
        finally:  # what was written down is spent, whatever became of it
            accountant.load_state_dict(after.state_dict())
        if arrays is None:
            return arrays, metrics
        # Flower calls the methods above by names that it may change.
        is_followed = not isinstance(wrapper, _Following) or wrapper.following_norm > 0
        if wrapper.last_noise_stddev is None or not is_followed:
            raise PrivacyError(
                "this version of Flower adds noise in a way that is not accounted for",
                value=f"flwr {version('flwr')}",
                place=f"round {server_round}",
                remedy="install flwr 1.41 or 1.42; nothing of the round was given out, and it counts as spent",
            )
        if isinstance(wrapper, _Following):
            wrapper.clipping_norm, wrapper.following_norm = wrapper.following_norm, 0.0
        return arrays, metrics

    def _release(self) -> GaussianPrivacyEvent:
        return release(self.config.noise_multiplier, sampled=self.sampled, population=len(self.devices))

    def _check(self, replies: Sequence[Message], server_round: int) -> None:
        usable = [reply for reply in replies if reply.has_content()]
        if len(usable) != self.sampled:
            raise PrivacyError(
                f"the noise of a private round is meant for {self.sampled} replies, and there are {len(usable)}",
                place=f"round {server_round}",
                remedy="nothing was spent; see why the others are missing",
            )
        weights = {
            record.get(self.inner.weighted_by_key)
            for reply in usable
            for record in reply.content.metric_records.values()
        }
        if weights != {1}:
            raise PrivacyError(
                f"in a private round every device must have the weight 1 ({self.inner.weighted_by_key})",
                value=sorted(map(str, weights)),
                place=f"round {server_round}",
                remedy="nothing was spent; do the devices run the same code?",
            )

    def _begun(self) -> tuple[Wrapper, RdpAccountant]:
        if self._wrapper is None or self._accountant is None:
            raise PrivacyError("a private round needs to know its devices first", remedy="call begin()")
        return self._wrapper, self._accountant

    # --- evaluation is the inner strategy's business ----------------------------------------------------------------

    def configure_evaluate(
        self,
        server_round: int,  # noqa: ARG002
        arrays: ArrayRecord,  # noqa: ARG002
        config: ConfigRecord,  # noqa: ARG002
        grid: Grid,  # noqa: ARG002
    ) -> Iterable[Message]:
        """Nobody is asked: what devices would say of their text is not accounted for."""
        return []

    def aggregate_evaluate(
        self,
        server_round: int,  # noqa: ARG002
        replies: Iterable[Message],  # noqa: ARG002
    ) -> MetricRecord | None:
        """Nothing."""
        return None

    # --- what is kept ---------------------------------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        """What was spent and what for, for readers."""
        wrapper, _ = self._begun()
        return {
            **self.spent(),
            "dp": self.config.dp,
            "noise_multiplier": self.config.noise_multiplier,
            "clipping_norm": wrapper.clipping_norm,
            "noise_stddev": wrapper.noise_stddev if wrapper.last_noise_stddev is None else wrapper.last_noise_stddev,
            "devices": len(self.devices),
            "devices_per_round": self.sampled,
            "max_epsilon": self.config.max_epsilon or None,
            "neighbours": "one device more or less, with all that it holds",
            "accountant": "Rényi, without amplification (flwr.serverapp.RdpAccountant)",
        }

    def to_json(self) -> dict[str, Any]:
        """All that must not be lost: who takes part, the norm, and the accountant's state."""
        _, accountant = self._begun()
        return self._as_json(accountant)

    def _as_json(self, accountant: RdpAccountant) -> dict[str, Any]:
        return {
            **spent(accountant),
            "devices": list(self.devices),
            "sampled": self.sampled,
            "clipping_norm": self.clipping_norm,
            "accountant": accountant.state_dict(),
        }

    def restore(self, ledger: Any, checkpoint: Any | None) -> None:
        """Take up what a run has spent, in whatever way it ended.

        Args:
            ledger: What ``spend`` was last called with: it counts, whatever a checkpoint says.
            checkpoint: What :meth:`to_json` gave when the last complete round was saved, of which the norm is taken;
                None if there is no such round.

        Raises:
            RunError: One of them is damaged, of another run, or the ledger has less than the checkpoint.
        """
        if checkpoint is not None:
            before = PrivateAverage(self.inner, self.config)
            before.restore(checkpoint, None)
            self._take_up(ledger, before.clipping_norm)
            had, has = before.spent()["releases"], self.spent()["releases"]
            if has < had or (before.devices, before.sampled) != (self.devices, self.sampled):
                raise RunError(
                    f"must have all that the last checkpoint has: {had} releases of {len(before.devices)} devices",
                    value=f"{has} of {len(self.devices)}",
                    remedy="put back the file as the run wrote it",
                )
        else:
            self._take_up(ledger, None)

    def _take_up(self, saved: Any, clipping_norm: float | None) -> None:
        try:
            devices, sampled = tuple(saved["devices"]), saved["sampled"]
            norm = float(saved["clipping_norm"] if clipping_norm is None else clipping_norm)
            if not all(type(number) is int for number in (*devices, sampled)) or not 0 < norm < math.inf:
                raise ValueError("devices, sampled and clipping_norm must be numbers")
            self._settle(devices, sampled)
            wrapper, accountant = self._begun()
            accountant.load_state_dict(saved["accountant"])
            event = dataclasses.asdict(self._release())
            compositions: Any = accountant.state_dict()["compositions"]
            if any(part["event"] != event for part in compositions):
                raise ValueError("it holds releases with other noise")
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise RunError(
                f"must hold what the run has spent, and does not ({error})",
                remedy="put back the file as the run wrote it; a budget that nobody knows is spent",
            ) from error
        wrapper.clipping_norm = norm
