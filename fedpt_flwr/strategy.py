"""``FedPT``: a Flower strategy around another one, for devices that fail and messages that cannot be trusted.

The inner strategy decides how updates become one model; it may be a private one (:mod:`fedpt_flwr.privacy`). Around
it, this one makes a run reproducible (devices have stable numbers, sampling and the order of replies depend on the seed
alone), checks every reply before it is used, says what it refused, waits no longer than told, and hands each round's
outcome to a callback: that is where the server writes its checkpoint, scores, and distils.

Where the inner strategy begins with a weighted mean (``inner.FOLDED``), replies are fetched one by one in the order of
the devices' numbers and added up, so that memory does not grow with the number of devices. The others (medians, Krum)
need all replies beside each other, and get them.

A run can go on in another process as if it had never stopped. What a round depends on is its number, the seed, the
arrays that it sends and what the inner strategy carries over from the rounds before
(``inner.inner_state``).
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.common.logger import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedProx, Result, Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from numpy.typing import NDArray

from fedpt_flwr.aggregate import WeightedMean
from fedpt_flwr.answers import MAX_REASONS, answers, content_of
from fedpt_flwr.bounds import norm, shortened, update_norm
from fedpt_flwr.errors import ChangeError, ConfigError, DeviceError, PrivacyError, ReplyError, RoundError
from fedpt_flwr.inner import (
    FOLDED,
    WEIGHT,
    carried,
    flower_is_quiet,
    inner_state,
    is_folded,
)
from fedpt_flwr.limits import other_rank, parse_limits
from fedpt_flwr.lora import ProductMean, completed, leading
from fedpt_flwr.privacy import NORM_BIT, PrivateAverage
from fedpt_flwr.records import (
    ARRAYS,
    CONFIG,
    LIMITS,
    METRICS,
    PRIVATE_METRICS,
    DeviceCard,
    as_tensors,
    check_arrays,
    check_metrics,
    from_reply,
    message_bytes,
    sent_as,
    to_wire,
)
from fedpt_flwr.roster import Roster, listed
from fedpt_flwr.secure_sum.collector import changed
from fedpt_flwr.secure_sum.rounds import SecureRound
from fedpt_flwr.secure_sum.session import Rules

_FORWARDED_METRICS = (WEIGHT, "train-loss")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRound:
    """One device's part in one round.

    Attributes:
        device: Its stable number.
        bytes_down: Bytes of the train message, as serialised.
        bytes_up: Bytes of the reply, as serialised; 0 if there was none.
        metrics: The numbers it reported; empty if its reply was refused or absent.
        refused: Why its reply was not used, or empty.
        limits: What its node config limits, as it says, by key.
        update_norm: L2 norm of its change as it came; None where there is no bound on it.
    """

    device: int
    bytes_down: int
    bytes_up: int
    metrics: Mapping[str, float]
    refused: str = ""
    limits: Mapping[str, int | float | str] = dataclasses.field(default_factory=dict)
    update_norm: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoundOutcome:
    """What a round gave.

    Attributes:
        server_round: From 1.
        sent: The arrays that the devices began with; whoever gets them may clear the record.
        arrays: The aggregated arrays, float32.
        inner_state: What the inner strategy carries into the next round, see :func:`~fedpt_flwr.inner.inner_state`.
        train_loss: Mean over the devices' examples of the training loss, nats per answer token; None in a private run,
            in which devices do not tell.
        devices: One entry per sampled device, by number.
        seconds: From sending the arrays to having aggregated them.
        left_out: With exact aggregation of adapters: the norm of what the aggregated adapter leaves out of the mean of
            the devices' products, over the norm of that mean, all matrices together; else None.
    """

    server_round: int
    sent: ArrayRecord
    arrays: ArrayRecord
    inner_state: Mapping[str, NDArray[Any]]
    train_loss: float | None
    devices: Sequence[DeviceRound]
    seconds: float
    left_out: float | None = None


AfterAggregate = Callable[[RoundOutcome], ArrayRecord | None]
"""Called with every round's outcome; returns the arrays that the next round begins with, None for the aggregated."""


class _SelectedNodes(Grid):
    """A view of a grid that shows the nodes of one round only, so that the inner strategy samples exactly these."""

    def __init__(self, grid: Grid, node_ids: Sequence[int]) -> None:
        self._grid, self._node_ids = grid, list(node_ids)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._node_ids)

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._grid.send_and_receive(messages, timeout=timeout)


class FedPT(Strategy):
    """Wraps a Flower strategy for federated proxy-tuning.

    Args:
        inner_strategy: The strategy that aggregates. It must not sample: give it ``fraction_train=1.0`` and minimum
            numbers of nodes of 1, as :func:`make_inner_strategy` does.
        after_aggregate: Called with every round's outcome.
        seed: Seed of the sampling.
        fraction_train: Share of the devices that have examples that train in a round.
        min_devices: Devices that must be connected before a round begins.
        min_replies: Usable replies that a round needs.
        max_failed_rounds: Rounds in a row that may lack replies; the arrays stay as they were.
        wait_timeout_s: Seconds to wait for devices to connect, and for their answer to the first question.
        code_hash: Devices that run other code are refused; empty: any code is accepted.
        wire_dtype: Type of the arrays on the wire, see :mod:`fedpt_flwr.records`.
        max_update_norm: Longest change (L2 norm) that a device may send; 0: any.
        refuse_above_norm: Whether a reply with a longer one is refused; else the change is scaled down.
        expected: Devices that a run had before it was stopped, by number, with their shards: it goes on with exactly
            these. None: with any.
        on_devices: Called once with the devices' cards, as soon as enough of them are there for the first round.
        is_good_enough: Asked after every complete round, and by a run that goes on before its first; True ends the run.
        secure_sum: The rules by which devices' changes are summed without being seen; None: they are seen.
        lora_rank: Rank of the adapter that is tuned; 0: it is none.
        lora_aggregation: How adapters become one, see :mod:`fedpt_flwr.lora`: ``average``, ``exact``, or ``frozen-a``.
        taken: With ``int8``, for a run that goes on: the last complete round in which each device's answer was taken.

    Raises:
        ConfigError: The inner strategy must see single updates, and a secure sum shows none.
    """

    def __init__(
        self,
        inner_strategy: Strategy,
        after_aggregate: AfterAggregate | None = None,
        *,
        seed: int = 0,
        fraction_train: float = 1.0,
        min_devices: int = 1,
        min_replies: int = 1,
        max_failed_rounds: int = 0,
        wait_timeout_s: float = 120.0,
        code_hash: str = "",
        wire_dtype: str = "float32",
        max_update_norm: float = 0.0,
        refuse_above_norm: bool = False,
        expected: Mapping[int, DeviceCard] | None = None,
        on_devices: Callable[[Sequence[DeviceCard]], None] | None = None,
        is_good_enough: Callable[[], bool] | None = None,
        secure_sum: Rules | None = None,
        lora_rank: int = 0,
        lora_aggregation: str = "average",
        taken: Mapping[int, int] | None = None,
    ) -> None:
        if secure_sum is not None and not is_folded(inner_strategy):
            raise ConfigError(
                "a secure sum shows no single update, and this strategy must see them",
                value=type(inner_strategy).__name__,
                place="privacy.secure-sum and strategy.name",
                remedy=f"take one of {', '.join(strategy.__name__ for strategy in FOLDED)} as it is",
            )
        self.secure_sum = secure_sum
        self.inner = inner_strategy
        self.private = inner_strategy if isinstance(inner_strategy, PrivateAverage) else None
        self.after_aggregate = after_aggregate
        self.seed = seed
        self.fraction_train = fraction_train
        self.min_devices = min_devices
        self.min_replies = min_replies
        self.max_failed_rounds = max_failed_rounds
        self.wait_timeout_s = wait_timeout_s
        self.code_hash = code_hash
        self.wire_dtype = wire_dtype
        self.max_update_norm = max_update_norm
        self.refuse_above_norm = refuse_above_norm
        self.on_devices = on_devices
        self.is_good_enough = is_good_enough
        self.lora_rank = lora_rank
        self.lora_aggregation = lora_aggregation
        self.taken = dict(taken or {})
        self.roster = Roster(
            wait_timeout_s=wait_timeout_s, code_hash=code_hash, expected=expected, check=self._check_card
        )
        self._cards: dict[int, DeviceCard] = {}  # this round's, by device number
        self._broadcast = ArrayRecord()  # this round's, as the server holds it
        self._parts: dict[int, ArrayRecord] = {}  # of it, what devices of another rank hold, by rank
        self._sent: dict[int, Message] = {}  # this round's messages by device number
        self._sent_at = 0.0
        self._failed_rounds = 0

    def summary(self) -> None:
        """Log what is set."""
        log(
            INFO,
            "\t├──> FedPT: at least %d devices, %.0f %% of them a round, at least %d replies, around %s:",
            self.min_devices,
            100 * self.fraction_train,
            self.min_replies,
            type(self.inner).__name__,
        )
        self.inner.summary()

    # --- the rounds -----------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        first_round: int = 1,
    ) -> Result:
        """Run the rounds, as Flower's strategies do, from any round on and until the result is good enough.

        To go on after round ``n`` as if nothing had happened, call ``inner.set_inner_state`` with what was saved, and
        this with the arrays that round ``n + 1`` sends and ``first_round = n + 1``.

        Args:
            grid: Connects to the devices.
            initial_arrays: What the first of these rounds sends.
            num_rounds: Number of the last round.
            timeout: Seconds that a round waits for its devices.
            train_config: Sent with every train message.
            evaluate_config: Sent with every evaluate message, if the inner strategy evaluates on devices.
            evaluate_fn: Called with a round's number and arrays after every round, and before round 1 with 0.
            first_round: Number of the first of these rounds.

        Returns:
            The arrays after the last round, those given if there was none, and the metrics of these rounds.

        Raises:
            RoundError: Too few devices or usable replies.
        """
        begun = time.monotonic()
        train_config = ConfigRecord() if train_config is None else train_config
        evaluate_config = ConfigRecord() if evaluate_config is None else evaluate_config
        self._log_start(initial_arrays, first_round, num_rounds, train_config)
        result = Result(arrays=initial_arrays)
        if first_round == 1:
            _evaluate_on_server(evaluate_fn, 0, result)
        done = first_round > 1 and self._is_done()  # the process that went before may have ended after asking
        for server_round in range(first_round, num_rounds + 1):
            if done or not self._affords_another(server_round):
                break
            log(INFO, "")
            log(INFO, "[ROUND %s/%s]", server_round, num_rounds)
            complete = self._train_on_devices(grid, server_round, result, train_config, timeout)
            self._evaluate_on_devices(grid, server_round, result, evaluate_config, timeout)
            _evaluate_on_server(evaluate_fn, server_round, result)
            done = complete and self._is_done()
        log(INFO, "")
        log(INFO, "Strategy execution finished in %.2fs", time.monotonic() - begun)
        return result

    def _log_start(
        self, arrays: ArrayRecord, first_round: int, num_rounds: int, train_config: Mapping[str, Any]
    ) -> None:
        log(INFO, "Starting %s strategy:", type(self).__name__)
        log(INFO, "\t├── Number of rounds: %d", num_rounds)
        if first_round > 1:
            log(INFO, "\t├── First of them: %d", first_round)
        log(INFO, "\t├── ArrayRecord (%.2f MB)", sum(len(array.data) for array in arrays.values()) / 1024**2)
        log(INFO, "\t├── ConfigRecord (train): %s", dict(train_config) or "(empty!)")
        self.summary()
        log(INFO, "")

    def _affords_another(self, server_round: int) -> bool:
        """Whether the privacy budget, if there is one, allows this round.

        Raises:
            PrivacyError: Not even the first round.
        """
        if self.private is None or self.private.affords_another():
            return True
        spent, budget = self.private.spent(), self.private.config.max_epsilon
        if not spent["releases"]:
            raise PrivacyError(
                "the budget must allow at least one round",
                value=budget,
                place="privacy.max-epsilon",
                remedy="raise it, or privacy.noise-multiplier",
            )
        log(
            WARNING,
            "The privacy budget is spent: %d rounds cost epsilon %.4g, and round %d would go above %g; the run ends "
            "here",
            spent["releases"],
            spent["epsilon"],
            server_round,
            budget,
        )
        return False

    def _is_done(self) -> bool:
        return self.is_good_enough is not None and self.is_good_enough()

    def _train_on_devices(
        self, grid: Grid, server_round: int, result: Result, config: ConfigRecord, timeout: float
    ) -> bool:
        """Train for one round; whether it was completed."""
        self.configure_train(server_round, result.arrays, config, grid)
        result.arrays = self._broadcast  # the same, and held once
        if self.secure_sum is not None:
            arrays, metrics = self._sum_on_devices(grid, server_round, self.secure_sum, timeout)
        else:
            came = answers(grid, self._sent, timeout_s=timeout, what=f"Round {server_round}")
            arrays, metrics = self._take_in(server_round, came)
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            result.train_metrics_clientapp[server_round] = metrics
        if arrays is None:
            return False
        result.arrays = arrays
        return True

    @property
    def _num_needed(self) -> int:
        """Replies without which no round is completed."""
        return self.min_replies if self.secure_sum is None else max(self.min_replies, self.secure_sum.at_least)

    def _evaluate_on_devices(
        self, grid: Grid, server_round: int, result: Result, config: ConfigRecord, timeout: float
    ) -> None:
        messages = self.configure_evaluate(server_round, result.arrays, config, grid)
        metrics = self.aggregate_evaluate(server_round, grid.send_and_receive(messages, timeout=timeout))
        if metrics is not None:
            log(INFO, "\t└──> Aggregated MetricRecord: %s", metrics)
            result.evaluate_metrics_clientapp[server_round] = metrics

    # --- before a round -------------------------------------------------------------------------------------------

    def meet_devices(self, grid: Grid) -> dict[int, DeviceCard]:
        """Wait until enough devices are connected and have said who they are.

        Before the first round it may be called beforehand, to know the devices without asking anything else of them.

        Returns:
            The connected devices' cards by Flower's node id, one node for each number.

        Raises:
            RoundError: Too few within the deadline, or, before the first round, two devices with one number; says who
                declined and why.
            RunError: Before the first round: they are not those that are expected.
        """
        is_first = not self.roster.devices
        # Who comes later has no part in a private run, and takes nobody's place in it.
        present = self.roster.meet(grid, self.min_devices, among=self.private.devices if self.private else ())
        if is_first:
            self.roster.log_shards(are_told=self.private is None)
            if self.on_devices is not None:
                self.on_devices(list(self.roster.devices.values()))
        return present

    def _check_card(self, card: DeviceCard) -> None:
        if self.private is not None:
            _check_discreet(card)
        self._check_rank(card)

    def _check_rank(self, card: DeviceCard) -> None:
        """Refuse a device whose adapter cannot be aggregated with the others'.

        Raises:
            DeviceError: It has another rank, and this run cannot have that.
        """
        if not card.lora_rank:
            return
        rule, remedy = other_rank(card.lora_rank, self.lora_rank, self.lora_aggregation)
        if not rule and self.secure_sum is not None:
            rule = "in a secure sum all devices must send arrays of the same shapes"
            remedy = "leave lora-rank out of its node config"
        if not rule and self.private is not None:
            rule = "noise is accounted for on the plain mean of arrays of the same shapes"
            remedy = "leave lora-rank out of its node config"
        if not rule and not is_folded(self.inner):
            rule = f"{type(self.inner).__name__} compares the devices' arrays, which must then have one rank"
            remedy = "leave lora-rank out, or set strategy.name='FedAvg'"
        if rule:
            place = f"device {card.device}, node config, lora-rank"
            raise DeviceError(rule, value=card.lora_rank, place=place, remedy=remedy)

    def _own(self, device: int) -> ArrayRecord:
        """What the server holds of that which a device tunes: all arrays of the round, or the leading directions."""
        rank = self._cards[device].lora_rank
        if not rank:
            return self._broadcast
        if rank not in self._parts:
            self._parts[rank] = ArrayRecord(
                {
                    name: Array(np.ascontiguousarray(leading(name, array.numpy(), rank)))
                    for name, array in self._broadcast.items()
                }
            )
        return self._parts[rank]

    @property
    def _keeps_residuals(self) -> bool:
        """Whether devices keep what 8 bits lost: not where the arrays of the next round are other directions."""
        return self.wire_dtype == "int8" and not self._is_exact

    @property
    def _is_exact(self) -> bool:
        return self.lora_rank > 0 and self.lora_aggregation == "exact"

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample devices by (seed, round) over their sorted numbers and let the inner strategy address them."""
        present = self.meet_devices(grid)
        node_of = {card.device: node for node, card in present.items() if card.num_examples > 0}
        if self.private is not None and self.private.devices:  # who comes later has no part in it
            node_of = {device: node for device, node in node_of.items() if device in self.private.devices}
        self._cards = {card.device: card for card in present.values()}
        sampled = sample_devices(
            list(node_of), self.fraction_train, self._num_needed, seed=self.seed, server_round=server_round
        )
        if self.private is not None:
            self.private.begin(list(node_of), len(sampled))
            self.min_devices = max(self.min_devices, len(node_of))  # from now on all of them are waited for
        log(INFO, "Round %d: devices %s train", server_round, listed(sampled))
        config = ConfigRecord({**config, "server-round": server_round, "code-hash": self.code_hash})
        # By name, however they came from a model, a file or a teacher: sums over all arrays depend on their order, and
        # FedAvgM keeps its momentum as a list.
        arrays = ArrayRecord(dict(sorted(arrays.items())))
        self._broadcast, self._parts = arrays, {}
        if isinstance(self.inner, FedAvgM):
            # It takes what it made of the last round for what the devices began with. That may have been replaced by
            # after_aggregate, or refused, or have been made in another process.
            self.inner.current_arrays = arrays
        messages = self.inner.configure_train(
            server_round, arrays, config, _SelectedNodes(grid, [node_of[device] for device in sampled])
        )
        device_of = {node: device for device, node in node_of.items()}
        self._sent = {device_of[message.metadata.dst_node_id]: message for message in messages}
        self._sent = dict(sorted(self._sent.items()))
        on_wire: dict[int, ArrayRecord] = {}
        for device, message in self._sent.items():
            rank = self._cards[device].lora_rank
            if rank not in on_wire:
                place = f"what round {server_round} sends"
                on_wire[rank] = to_wire(self._own(device), sent_as(self.wire_dtype), place=place)
            message.content = RecordDict({**message.content, ARRAYS: on_wire[rank]})
            if self._keeps_residuals:
                told = {**message.content.config_records[CONFIG], "residual-of": self.taken.get(device, 0)}
                message.content[CONFIG] = ConfigRecord(told)
        self._sent_at = time.monotonic()
        return list(self._sent.values())

    # --- after a round --------------------------------------------------------------------------------------------

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check replies, sort them by device number, let the inner strategy aggregate, call ``after_aggregate``.

        Raises:
            RoundError: Too few usable replies, in more rounds in a row than allowed.
        """
        if self.secure_sum is not None:
            raise RoundError(
                "a secure sum asks devices four times a round, which Flower's own loop does not",
                place="privacy.secure-sum",
                remedy="call the method start of FedPT",
            )
        device_of = {message.metadata.message_id: device for device, message in self._sent.items()}
        received: dict[int, Message] = {}
        for reply in replies:
            device = device_of.get(reply.metadata.reply_to_message_id)  # an error made by the SuperLink names no node
            if device is None:
                log(WARNING, "Round %d: a reply to no message of this round is left out", server_round)
            else:
                received[device] = reply
        return self._take_in(server_round, ((device, received.pop(device, None)) for device in self._sent))

    def _take_in(
        self, server_round: int, came: Iterable[tuple[int, Message | None]]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in the reply of every sampled device, or None, in the order of their numbers; then as above."""
        # What is expected of the mean is what the devices said they have: then its bits are Flower's.
        expected = sum(self._cards[device].num_examples for device in self._sent)
        mean: WeightedMean | ProductMean | None = None
        if self._is_exact:
            mean = ProductMean(expected, self.lora_rank)
        elif is_folded(self.inner):
            mean = WeightedMean(expected)
        usable: list[Message] = []
        devices: list[DeviceRound] = []
        for device, reply in came:
            devices.append(self._take(server_round, device, reply, usable, mean))
            del reply  # before the next one is fetched
        self._log_refused(server_round, ((part.device, part.refused) for part in devices))
        arrays, metrics = self._finish_round(server_round, usable, mean, devices)
        self._broadcast, self._sent, self._parts = ArrayRecord(), {}, {}
        return arrays, metrics

    def _sum_on_devices(
        self, grid: Grid, server_round: int, rules: Rules, timeout: float
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Have the devices' changes summed unseen; what comes of it is as if one device had sent their mean."""
        summing = SecureRound(
            grid=grid,
            sent=self._sent,
            cards=self._cards,
            rules=rules,
            server_round=server_round,
            read=content_of,
        )
        arrays, metrics = None, None
        try:
            opened = summing.run(timeout_s=timeout, answer_timeout_s=min(timeout, self.wait_timeout_s))
        except RoundError as error:
            self._log_refused(server_round, ((device, part.refused) for device, part in summing.parts.items()))
            self._fail(error)
        else:
            devices = [
                DeviceRound(
                    device=device,
                    bytes_down=part.bytes_down,
                    bytes_up=part.bytes_up,
                    metrics={} if part.refused else part.metrics,
                    refused=part.refused,
                    limits=part.limits,
                )
                for device, part in summing.parts.items()
            ]
            self._log_refused(server_round, ((part.device, part.refused) for part in devices))
            mean = WeightedMean(opened.num_examples)
            mean.add(changed(self._broadcast, opened), opened.num_examples)
            told = MetricRecord({WEIGHT: opened.num_examples, "train-loss": opened.train_loss})
            reply = Message(RecordDict({METRICS: told}), reply_to=self._any_sent())
            arrays, metrics = self._finish_round(server_round, [reply], mean, devices)
        self._broadcast, self._sent, self._parts = ArrayRecord(), {}, {}
        return arrays, metrics

    def _take(
        self,
        server_round: int,
        device: int,
        reply: Message | None,
        usable: list[Message],
        mean: WeightedMean | ProductMean | None,
    ) -> DeviceRound:
        """Check a reply; append it to ``usable``, without its arrays if they could be added to ``mean``."""
        sent = self._sent[device].content
        received = reply.content if reply is not None and reply.has_content() else RecordDict()
        place = f"device {device}, round {server_round}"
        up, metrics, reason = 0, {}, ""
        limits: dict[str, int | float | str] = {}
        length = None
        try:
            if reply is None:
                raise ReplyError("no reply came in time", place=place, remedy="see round-timeout-s")
            limits = _limits(reply, place)
            content = content_of(reply)
            private = self._private_part(content, place)
            up = message_bytes(content)
            if set(content.array_records) != {ARRAYS}:
                raise ReplyError("a reply must hold one record of arrays", value=sorted(content), place=place)
            own = self._own(device)
            arrays = check_arrays(content.array_records[ARRAYS], own, place=place, dtype=self.wire_dtype)
            metrics = check_metrics(
                content, server_round=server_round, card=self._cards[device], place=place, **self._metric_names()
            )
            forwarded = {name: metrics[name] for name in _FORWARDED_METRICS if name in metrics}
            reply.content = RecordDict({METRICS: MetricRecord({**forwarded, **private})})
            tuned, length = self._bounded(arrays, own, place)
            if own is not self._broadcast:
                tuned = ((name, completed(name, part, self._broadcast[name].numpy())) for name, part in tuned)
            if mean is not None:
                mean.add(tuned, metrics[WEIGHT])
            else:
                reply.content[ARRAYS] = ArrayRecord({name: Array(values) for name, values in tuned})
            usable.append(reply)
        except (ReplyError, DeviceError) as error:
            if self.private is not None and isinstance(error, ChangeError):
                error.place = place  # not in which array: that depends on the device's data
            metrics, reason = {}, str(error)
        for record in received.array_records.values():  # a RecordDict is in a cycle with views of itself
            record.clear()
        down = message_bytes(sent)
        return DeviceRound(
            device=device,
            bytes_down=down,
            bytes_up=up,
            metrics=metrics,
            refused=reason,
            limits=limits,
            update_norm=length,
        )

    def _private_part(self, content: RecordDict, place: str) -> dict[str, int]:
        """Take out of a reply what only Flower's wrapper may see, since it is not noisy yet.

        Raises:
            ReplyError: It is not there.
        """
        if self.private is None or not self.private.wants_norm_bits:
            return {}
        record = content.metric_records.get(METRICS, MetricRecord())
        if record.get(NORM_BIT) not in (0, 1):
            raise ReplyError("a reply must say whether it was clipped", value=record.get(NORM_BIT), place=place)
        return {NORM_BIT: int(float(str(record.pop(NORM_BIT))))}

    def _metric_names(self) -> dict[str, Sequence[str]]:
        """What a private reply may hold: whatever more it said would not be accounted for, and so it is refused."""
        return {} if self.private is None else {"required": PRIVATE_METRICS, "optional": ()}

    def _bounded(
        self, arrays: ArrayRecord, own: ArrayRecord, place: str
    ) -> tuple[Iterable[tuple[str, NDArray[np.float32]]], float | None]:
        """A device's arrays, their change no longer than it may be, and how long it was if that was looked at.

        Raises:
            ReplyError: It is longer, and longer ones are refused.
        """

        def tuned() -> Iterator[tuple[str, NDArray[np.float32]]]:
            return from_reply(arrays, own, self.wire_dtype)

        if self.private is None and not self.max_update_norm:
            return tuned(), None
        sent = {name: tensor.numpy() for name, tensor in as_tensors(own).items()}
        length = update_norm(tuned(), sent)
        if self.private is not None:
            self._check_private(length, norm(sent.items()), place)
            return tuned(), None  # how long it was is not told
        if length <= self.max_update_norm:
            return tuned(), length
        if self.refuse_above_norm:
            raise ReplyError(
                f"a device's change must have a norm of at most {self.max_update_norm:g}",
                value=float(f"{length:.4g}"),
                place=place,
                remedy="is it to be trusted? If so, raise strategy.max-update-norm",
            )
        return shortened(tuned(), sent, self.max_update_norm / length), length

    def _check_private(self, length: float, size: float, place: str) -> None:
        if length == 0:
            raise ReplyError("a device's change must not be zero in a private run", place=place, remedy="did it train?")
        longest = self.private.longest_reply if self.private is not None else None
        # The device rounded `sent + change` to float32 after it clipped the change.
        if longest is not None and length > longest * (1 + 1e-5) + 2**-23 * size:
            raise ReplyError(
                f"a device must clip its change to the norm {longest:g} that it was sent",
                place=place,
                remedy="does it run the same code?",
            )

    def _log_refused(self, server_round: int, devices: Iterable[tuple[int, str]]) -> None:
        """Log why devices are left out, all of them: a round that fails leaves no other trace of it."""
        for device, reason in devices:
            if reason:
                log(WARNING, "Round %d: device %d is left out: %s", server_round, device, reason)

    def _finish_round(
        self,
        server_round: int,
        usable: list[Message],
        mean: WeightedMean | ProductMean | None,
        devices: Sequence[DeviceRound],
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate, and hand the outcome on; or survive a failed round."""
        num_replies = sum(not part.refused for part in devices)  # of a secure sum one comes in here
        needed = self.min_replies if self.private is None else len(devices)  # its noise is meant for so many
        if num_replies < needed:
            reasons = list(dict.fromkeys(part.refused for part in devices if part.refused))
            unspent = "" if self.private is None else "; nothing was spent on this round"
            self._fail(
                RoundError(
                    f"round {server_round} needs {needed} usable replies of {len(devices)} devices and has "
                    f"{num_replies}",
                    place="min-replies" if self.private is None else "privacy.dp",
                    remedy=f"checkpoints of earlier rounds are kept{unspent}",
                    problems=reasons[:MAX_REASONS],
                )
            )
            return None, None
        try:
            arrays, train_loss = self._aggregate(server_round, usable, mean)
        except RoundError as error:
            self._fail(error)
            return None, None
        self._failed_rounds = 0
        self._sent = {}
        self.taken |= {part.device: server_round for part in devices if not part.refused}
        outcome = RoundOutcome(
            server_round=server_round,
            sent=self._broadcast,
            arrays=arrays,
            inner_state=inner_state(self.inner),
            train_loss=train_loss,
            devices=devices,
            seconds=time.monotonic() - self._sent_at,
            left_out=mean.left_out if isinstance(mean, ProductMean) else None,
        )
        following = self.after_aggregate(outcome) if self.after_aggregate else None
        summary = MetricRecord({"num-replies": num_replies})
        if train_loss is not None:
            summary["train-loss"] = train_loss
        return (following if following is not None else arrays), summary

    def _aggregate(
        self, server_round: int, usable: list[Message], mean: WeightedMean | ProductMean | None
    ) -> tuple[ArrayRecord, float | None]:
        """What the inner strategy makes of the replies, or of their mean, and the mean training loss if it is told.

        Raises:
            RoundError: It cannot, or what it makes or carries into the next round is not finite. It then carries what
                it carried before, so that the next round can be tried.
        """
        before = carried(self.inner)
        try:
            return self._finite_aggregate(server_round, usable, mean)
        except RoundError:
            for field, value in before.items():
                setattr(self.inner, field, value)
            raise

    def _finite_aggregate(
        self, server_round: int, usable: list[Message], mean: WeightedMean | ProductMean | None
    ) -> tuple[ArrayRecord, float | None]:
        name = type(self.inner).__name__
        arrays = metrics = failure = None
        try:
            with np.errstate(all="ignore"):  # what is not finite is found below
                if self.private is not None:
                    with flower_is_quiet():  # its wrappers log a line for every reply
                        arrays, metrics = self.private.aggregate_train(server_round, usable)
                elif mean is None:
                    arrays, metrics = self.inner.aggregate_train(server_round, usable)
                else:
                    arrays, metrics = self._aggregate_mean(server_round, usable, mean)
        except (AppExitException, ArithmeticError, TypeError, ValueError) as error:
            failure = error
        if arrays is None or metrics is None:
            raise RoundError(
                f"{name} cannot aggregate round {server_round} ({failure or 'it made nothing of the replies'})",
                place="strategy.name",
                remedy=f"does it need more than {len(usable)} replies, or other strategy.arguments?",
            ) from failure
        result = _as_float32(arrays)
        if result is None or not all(np.isfinite(part).all() for part in inner_state(self.inner).values()):
            raise RoundError(
                f"what {name} made of round {server_round} must be finite numbers",
                place="strategy.arguments",
                remedy="lower its learning rate",
            )
        return result, float(np.asarray(metrics["train-loss"]).item()) if "train-loss" in metrics else None

    def _aggregate_mean(
        self, server_round: int, usable: list[Message], mean: WeightedMean | ProductMean
    ) -> tuple[ArrayRecord | None, MetricRecord]:
        """What the inner strategy makes of the replies' weighted mean, which is all that it would see of them."""
        metrics = aggregate_metricrecords([reply.content for reply in usable], WEIGHT)
        means = ArrayRecord({name: Array(values) for name, values in mean.take()})
        if type(self.inner) in (FedAvg, FedProx):
            return means, metrics
        # As if one device had sent it: the mean of one is itself, bit for bit.
        content = RecordDict({ARRAYS: means, METRICS: MetricRecord({**metrics, WEIGHT: 1})})
        with flower_is_quiet():
            arrays, _ = self.inner.aggregate_train(server_round, [Message(content, reply_to=self._any_sent())])
        return arrays, metrics

    def _any_sent(self) -> Message:
        return next(iter(self._sent.values()))

    def _fail(self, error: RoundError) -> None:
        """Survive a failed round with the model as it was, or end the run."""
        self._failed_rounds += 1
        if self._failed_rounds > self.max_failed_rounds:
            raise error
        log(
            WARNING,
            "%s; the model stays as it was (%d of %d such rounds in a row are allowed)",
            error,
            self._failed_rounds,
            self.max_failed_rounds,
        )

    # --- evaluation on devices is the inner strategy's business ---------------------------------------------------

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """As the inner strategy does."""
        return self.inner.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """As the inner strategy does, unless nobody was asked."""
        replies = list(replies)
        return self.inner.aggregate_evaluate(server_round, replies) if replies else None


def sample_devices(
    devices: Sequence[int], fraction: float, at_least: int, *, seed: int, server_round: int
) -> list[int]:
    """Draw the devices of a round; depends on the numbers, the seed and the round alone.

    Args:
        devices: Numbers of the devices that have examples, in any order.
        fraction: Share to draw, rounded down.
        at_least: Never fewer than this, as long as there are so many.
        seed: Of the run.
        server_round: From 1.

    Returns:
        The drawn numbers, sorted.
    """
    count = num_sampled(len(devices), fraction, at_least)
    # random.Random takes text seeds through SHA-512, the same on every machine.
    return sorted(random.Random(f"{seed}/{server_round}").sample(sorted(devices), count))


def num_sampled(num_devices: int, fraction: float, at_least: int) -> int:
    """How many devices :func:`sample_devices` draws of so many."""
    return min(num_devices, max(1, at_least, int(num_devices * fraction + 1e-9)))


def _check_discreet(card: DeviceCard) -> None:
    """Make sure that a device of a private run says no more of its data than that there is some.

    Raises:
        ReplyError: It does.
    """
    if card.num_examples > 1 or card.groups:
        raise ReplyError(
            "in a private run a device must not say how many examples it has, or of which groups",
            place=f"device {card.device}",
            remedy="does it run the same code?",
        )


def _as_float32(arrays: ArrayRecord) -> ArrayRecord | None:
    """What a strategy made of the updates (some compute in float64), or None if it is not finite."""
    finite: dict[str, Array] = {}
    for name, array in arrays.items():
        stored = array.numpy()
        with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is found
            # The order in memory is the devices', who may say anything; safetensors wants rows one after the other.
            values = np.asarray(stored, np.float32, order="C")
        if not np.isfinite(values).all():
            return None
        finite[name] = array if values is stored else Array(values)
    return ArrayRecord(finite)


def _evaluate_on_server(
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None, server_round: int, result: Result
) -> None:
    metrics = evaluate_fn(server_round, result.arrays) if evaluate_fn is not None else None
    if metrics is not None:
        log(INFO, "\t└──> Round %d on the server: %s", server_round, metrics)
        result.evaluate_metrics_serverapp[server_round] = metrics


def _limits(reply: Message, place: str) -> dict[str, int | float | str]:
    """The limits that a device says it has.

    Raises:
        DeviceError: One of them is none.
    """
    if reply.has_error() or LIMITS not in reply.content.config_records:
        return {}
    return parse_limits(reply.content.config_records[LIMITS], place=place).to_flat()
