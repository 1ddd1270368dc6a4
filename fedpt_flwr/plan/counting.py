"""What one way to tune costs: bytes, memory, operations, tokens through the large model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from fedpt_flwr.architectures import find_architecture
from fedpt_flwr.config import AUTO, RunConfig, TrainConfig
from fedpt_flwr.data import TokenizedExample, num_drawn
from fedpt_flwr.distillation import num_answer_tokens
from fedpt_flwr.distiller import (
    DRIFT_TEXTS,
    IN_ROUNDS,
    MAX_DRIFT_SCORES,
    MAX_REMEMBERED_BYTES,
    SHARES,
    WITH_DEVICE_COPY,
)
from fedpt_flwr.errors import ConfigError, DeviceError, ModelError, naming
from fedpt_flwr.evaluation import WRITTEN_POINTS
from fedpt_flwr.inner import FOLDED
from fedpt_flwr.lora import dense_size
from fedpt_flwr.losses import tokens_read
from fedpt_flwr.memory import BYTES_OF, UNTOLD_BASE_BYTES, MemoryNeed, memory_of, tunable_shape
from fedpt_flwr.models import WORTH_RESTING_BYTES, output_size, shapes_of
from fedpt_flwr.plan.texts import PlannedTexts, Texts, length, mean
from fedpt_flwr.records import array_bytes, sent_as
from fedpt_flwr.strategy import num_sampled, sample_devices
from fedpt_flwr.training import count_flops, count_forward_flops, num_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FEDPT, LARGE, LARGE_LORA = "fedpt", "large_federated", "large_federated_lora"
"""The columns of a plan: the run itself, and devices that tune the large model, as ``fedpt compare`` calls them."""

DEVICE_FLOPS = 1e11
"""Assumed of a device, in operations per second: some CPU cores, or a small accelerator."""

SERVER_FLOPS = 1e14
"""Assumed of the server: about a third of what a data-centre GPU of 2020 is said to do in bfloat16."""

_DRAWN_ROUNDS = 4096  # whose devices are drawn; the mean over more rounds is that over these
_SHOWN_ITEMS = 12  # answers that a run keeps token by token
_MOMENTS = {"FedAvgM": 1, "FedAdagrad": 2, "FedAdam": 2, "FedYogi": 2}  # models that a strategy carries along


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How fast machines are, and what the large model's tokens cost.

    Attributes:
        device_flops: Operations that a device does in a second of training.
        server_flops: Operations that the server does in a second.
        price: Of a million tokens through the large model, in any currency; None: nobody said.

    Raises:
        ConfigError: One is not a number that it can be.
    """

    device_flops: float = DEVICE_FLOPS
    server_flops: float = SERVER_FLOPS
    price: float | None = None

    def __post_init__(self) -> None:
        for option, value in (("--device-flops", self.device_flops), ("--server-flops", self.server_flops)):
            if not 0 < value < math.inf:
                raise ConfigError("must be operations per second, greater than 0", value=value, place=option)
        if self.price is not None and not 0 <= self.price < math.inf:
            raise ConfigError("must be a finite price of at least 0", value=self.price, place="--price")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What one way to tune costs.

    Attributes:
        name: One of :data:`FEDPT`, :data:`LARGE` and :data:`LARGE_LORA`.
        title: Which model devices tune, and how much of it; for people.
        parameters: Weights of the model that devices hold.
        trainable: Weights that devices tune and send.
        bytes_down: Bytes to a device in a round.
        bytes_up: Bytes from it.
        bytes_in_all: Both, of all devices and rounds.
        memory: Of the device whose round takes most.
        tokens: Tokens that go through the model on a device in a round; mean over the devices.
        flops: Operations of that.
        seconds: Time of that, at the rate that was told.
        server_memory: Bytes by what holds them; ``peak`` is the most at one time.
        server_flops: Operations of the server in the whole run; those of a large model behind an API are not its own.
        server_seconds: Time of that.
        large_tokens: Tokens through the large model in the whole run, by phase as in ``costs.jsonl``; empty where
            devices tune it and nobody sells it.
        money: What these cost; None where there is no price or no such token.
        decoding: Operations of one token that the result writes, in those of one of the large model; None where that is
            behind an API.
    """

    name: str
    title: str
    parameters: int
    trainable: int
    bytes_down: int
    bytes_up: int
    bytes_in_all: int
    memory: MemoryNeed
    tokens: float
    flops: float
    seconds: float
    server_memory: Mapping[str, int]
    server_flops: float
    server_seconds: float
    large_tokens: Mapping[str, float]
    money: float | None
    decoding: float | None

    def to_json(self) -> dict[str, Any]:
        """The column in the names of ``results.json``, where that measures the same."""
        tokens = {f"server_large_tokens_{phase}": round(number) for phase, number in self.large_tokens.items()}
        total = {"server_large_tokens": sum(tokens.values())} if tokens else {}
        return {
            "parameters": self.parameters,
            "trainable_parameters": self.trainable,
            "bytes_down_per_device_and_round": self.bytes_down,
            "bytes_up_per_device_and_round": self.bytes_up,
            "bytes_in_all": self.bytes_in_all,
            "device_state_bytes": self.memory.state(),
            "device_memory_growth_bytes": self.memory.total(),
            "device_peak_memory_bytes": UNTOLD_BASE_BYTES + self.memory.total(),
            "device_memory_parts": dataclasses.asdict(self.memory),
            "device_tokens_per_round": self.tokens,
            "device_flops_per_round": self.flops,
            "device_seconds_per_round": self.seconds,
            "server_memory_bytes": dict(self.server_memory),
            "server_flops": self.server_flops,
            "server_seconds": self.server_seconds,
            **total,
            **tokens,
            **({} if self.money is None else {"money": self.money}),
            **({} if self.decoding is None else {"decoding_flops_in_large": self.decoding}),
        }


class Counting:
    """Counts one column.

    Args:
        config: Of the run; where devices tune the large model, that is the small one, too.
        kind: Which column.
        texts: Of the run.
        rates: Of machines and prices.
    """

    def __init__(self, config: RunConfig, kind: str, texts: PlannedTexts, rates: Rates) -> None:
        self._config, self._kind, self._texts, self._rates = config, kind, texts, rates
        model = config.model
        self._key = "model.small" if kind == FEDPT else "model.large"
        with naming(self._key):
            self._tuned = tunable_shape(_shapes(model.small), config.tuning)
        self._large: PreTrainedModel | None = self._tuned  # None: behind an API, and nobody here knows its shape
        if kind == FEDPT:
            with naming("model.large"):
                self._large = None if model.large_url else _shapes(model.large)
        self._arrays = {
            name: tuple(weight.shape) for name, weight in self._tuned.named_parameters() if weight.requires_grad
        }
        self._trainable: int = sum(math.prod(shape) for shape in self._arrays.values())
        self._sampled = num_sampled(len(texts.shards), config.fraction_train, config.replies_needed)
        self._vocab = min(map(output_size, filter(None, (self._large, self._tuned))))

    def column(self) -> Column:
        """Everything."""
        config, rates = self._config, self._rates
        bytes_down = array_bytes(self._arrays, sent_as(config.wire.dtype))
        bytes_up = array_bytes(self._arrays, config.wire.dtype)
        if config.privacy.secure_sum:  # one array of whole numbers; keys and shares beside it are left out
            as_long_as = {16: "float16", 32: "float32"}[config.privacy.secure_sum_bits]
            bytes_up = array_bytes({"words": (self._trainable,)}, as_long_as)
        tokens = self.device_tokens()
        flops = count_flops(self._tuned, tokens)
        memory = self.device_memory()
        server_memory = self.server_memory(memory)
        reads = self.server_reads()
        server_flops = (
            (0.0 if self._large is None else count_forward_flops(self._large, sum(reads.large.values())))
            + count_forward_flops(self._tuned, reads.small)
            + count_flops(self._tuned, reads.learnt)
        )
        is_sold = self._kind == FEDPT
        large_tokens = reads.large if is_sold else {}
        return Column(
            name=self._kind,
            title=self._title(),
            parameters=sum(weight.numel() for weight in self._tuned.parameters()),
            trainable=self._trainable,
            bytes_down=bytes_down,
            bytes_up=bytes_up,
            bytes_in_all=(bytes_down + bytes_up) * self._sampled * config.num_server_rounds,
            memory=memory,
            tokens=tokens,
            flops=flops,
            seconds=flops / rates.device_flops,
            server_memory=server_memory,
            server_flops=server_flops,
            server_seconds=server_flops / rates.server_flops,
            large_tokens=large_tokens,
            money=None if rates.price is None or not is_sold else rates.price * sum(large_tokens.values()) / 1e6,
            decoding=self._decoding(),
        )

    def _decoding(self) -> float | None:
        if self._kind != FEDPT:
            return 1.0
        if self._large is None:
            return None
        return 1.0 + 2 * count_forward_flops(self._tuned, 1) / count_forward_flops(self._large, 1)

    def _title(self) -> str:
        tuning = self._config.tuning
        how = "all weights" if tuning.mode == "full" else f"LoRA rank {tuning.lora_rank}"
        return f"FedPT, small LM: {how}" if self._kind == FEDPT else f"large LM: {how}"

    # --- a device ---

    def device_tokens(self) -> float:
        """Tokens that go through the model in a round, mean over the rounds and the devices that train in each."""
        config = self._config
        known: dict[int, float] = {}  # devices whose texts are only assumed share one list
        for shard in self._texts.shards.values():
            if id(shard) not in known:
                batches = num_steps(config.train, len(shard)) * config.train.accumulation_steps
                known[id(shard)] = num_drawn(len(shard), config.train.batch_size, batches) * mean(map(length, shard))
        tokens = {device: known[id(shard)] for device, shard in self._texts.shards.items()}
        if self._sampled == len(tokens) or len(known) == 1:
            return mean(tokens.values())
        sampled = (
            sample_devices(
                list(tokens), config.fraction_train, config.replies_needed, seed=config.seed, server_round=server_round
            )
            for server_round in range(1, min(config.num_server_rounds, _DRAWN_ROUNDS) + 1)
        )
        return mean(tokens[device] for devices in sampled for device in devices)

    def device_memory(self) -> MemoryNeed:
        """Of the device with the largest batch."""
        config = self._config
        size = config.train.batch_size
        fedprox_mu = config.train.fedprox_mu or config.strategy.parsed_arguments().get("proximal_mu", 0.0)
        shards = {id(shard): shard for shard in self._texts.shards.values()}.values()  # most may share one list
        largest = max(shards, key=lambda shard: min(size, len(shard)) * max(map(length, shard)))
        is_clipped = config.privacy.clips_on_devices
        return self._memory_of(
            config.train, largest, batch_size=size, with_fedprox=fedprox_mu > 0, with_clipping=is_clipped
        )

    def _memory_of(
        self, train: TrainConfig, texts: Texts, *, batch_size: int, with_fedprox: bool, with_clipping: bool = False
    ) -> MemoryNeed:
        model = self._config.model
        try:
            return memory_of(
                self._tuned,
                train,
                texts,
                dtype=model.small_dtype,
                batch_size=batch_size,
                with_fedprox=with_fedprox,
                with_clipping=with_clipping,
                ref=model.small,
            )
        except DeviceError as error:  # it speaks to devices
            raise ModelError(
                error.rule, value=error.value, place=self._key, remedy="measure it in a short run, and see --run"
            ) from error

    # --- the server's memory ---

    def server_memory(self, device: MemoryNeed) -> dict[str, int]:
        """Bytes by what holds them: weights and arrays, no caches of decoding."""
        config, mode = self._config, self._config.distillation.mode
        large = 0
        if self._kind == FEDPT and self._large is not None:
            large = BYTES_OF[config.model.large_dtype] * sum(weight.numel() for weight in self._large.parameters())
        # All weights: a second copy is the untuned model. An adapter can be switched off.
        copies = 2 if self._kind == FEDPT and config.tuning.mode == "full" else 1
        small = copies * device.weights
        rests = device.tuned >= WORTH_RESTING_BYTES and mode not in IN_ROUNDS
        collecting = self._collecting_bytes()
        distilling = self._distilling_bytes(device) if mode != "off" else 0
        peak = large + max(collecting + (0 if rests else small), small + device.tuned + distilling)
        return {"large": large, "small": small, "collecting": collecting, "distilling": distilling, "peak": peak}

    def _collecting_bytes(self) -> int:
        """The round's arrays, as they are and as they are sent; the replies, or their sum; what a strategy carries."""
        strategy, dtype = self._config.strategy.name, sent_as(self._config.wire.dtype)
        whole, sent = BYTES_OF["float32"] * self._trainable, BYTES_OF[dtype] * self._trainable
        on_wire = 0 if dtype == "float32" else sent
        replies = whole + sent if strategy in {folded.__name__ for folded in FOLDED} else (self._sampled + 1) * whole
        if self._config.privacy.is_on:  # all at once, and where the server clips their changes, too, in float64
            replies = (1 if self._config.privacy.clips_on_devices else 3) * self._sampled * whole + sent
        if self._config.tuning.mode == "lora" and self._config.tuning.lora_aggregation == "exact":
            replies = sent + min(self._sampled * whole, BYTES_OF["float32"] * dense_size(self._arrays))
        return whole + on_wire + replies + _MOMENTS.get(strategy, 0) * whole

    def _distilling_bytes(self, device: MemoryNeed) -> int:
        """A student or two with gradients, moments and activations, and what the teacher said."""
        config, lessons = self._config, self._texts.lessons
        size = config.distillation.batch_size
        need = self._memory_of(TrainConfig(), lessons, batch_size=size, with_fedprox=False)
        students = 2 if config.distillation.mode == "paired" else 1
        said = sum(map(num_answer_tokens, lessons)) * self._said_bytes()
        return students * (device.state() + need.activations) + min(said, MAX_REMEMBERED_BYTES)

    def _said_bytes(self) -> int:
        """What a teacher says of one token: the scores of the proxy and of the large model."""
        return 2 * BYTES_OF["float32"] * self._vocab

    # --- what goes through the server's models ---

    def server_reads(self) -> Reads:
        """Everything that the server reads and learns in the whole run."""
        return self._fedpt_reads() if self._kind == FEDPT else self._direct_reads()

    def _fedpt_reads(self) -> Reads:
        config, texts = self._config, self._texts
        rounds, mode = config.num_server_rounds, config.distillation.mode
        wanted, reads = config.scoring.row_names(), Reads()
        if config.scoring.round_items:
            items = texts.validation[: config.scoring.round_items]
            rows = {*wanted, "proxy"} if config.stop.metric else {*wanted}
            self._read_scores(reads, "validation", items, rows, times=rounds)
        if config.proxy.alpha == AUTO:
            self._read_curve(reads, "shift", times=rounds)
        if mode in IN_ROUNDS:
            settings = config.distillation
            self._read_lesson(reads, "distillation", settings.num_prompts, settings.steps, times=rounds - 1)
        self._read_test(reads, wanted)
        if "proxy" in wanted:
            # The large model says what it would have written, after the proxy wrote; what it chose is known.
            shown = self._written(self._tested()[:_SHOWN_ITEMS])
            written = 0 if texts.choices else shown
            reads.add("examples", large=shown + written, small=2 * written)
            if config.proxy.alpha != AUTO and not config.data.answer_pattern:
                self._read_curve(reads, "curve", times=1)
        if mode in WITH_DEVICE_COPY:
            settings = config.distillation
            self._read_lesson(reads, "device", settings.final_num_prompts, settings.final_steps, times=1)
            tried = len(SHARES) * self._answered(texts.validation)
            reads.small += tried + tokens_read(self._tested()) + self._answered(self._tested())
        return reads

    def _direct_reads(self) -> Reads:
        """Of a server that scores the tuned model alone."""
        config, reads = self._config, Reads()
        for items, times in (
            (self._texts.validation[: config.scoring.round_items], config.num_server_rounds),
            (self._tested(), 1),
        ):
            reads.small += times * (tokens_read(items) + self._answered(items))
        return reads

    def _tested(self) -> Texts:
        return self._texts.test[: self._config.scoring.num_items or None]

    def _read_scores(self, reads: Reads, phase: str, items: Texts, rows: Set[str], *, times: int) -> None:
        """Losses and answers of these rows; those of large and untuned never change, so that they answer once."""
        losses, answers = tokens_read(items), self._answered(items)
        if rows == {"tuned"}:
            reads.add(phase, large=0, small=times * (losses + answers))
        elif self._texts.choices:  # of all models together
            reads.add(phase, large=times * (losses + answers), small=2 * times * (losses + answers))
        else:
            by_proxy = times * answers * ("proxy" in rows)
            by_small = answers * (times * ("tuned" in rows) + ("untuned" in rows))
            reads.add(
                phase,
                large=times * losses + by_proxy + answers * ("large" in rows),
                small=2 * times * losses + 2 * by_proxy + by_small,
            )

    def _read_test(self, reads: Reads, wanted: Sequence[str]) -> None:
        items = self._tested()
        self._read_scores(reads, "test", items, {*wanted}, times=1)
        if self._texts.shot_tokens:
            room = (self._texts.context or math.inf) - self._longest_answer()
            shots = self._config.scoring.few_shot * self._texts.shot_tokens
            longer = sum(max(0.0, min(shots, room - len(item.prompt_ids))) for item in items)
            reads.add("test", large=tokens_read(items) + self._answered(items) + 2 * longer)

    def _read_curve(self, reads: Reads, phase: str, *, times: int) -> None:
        """What every alpha and mask give on the validation items."""
        items = self._texts.validation
        read = self._answered(items, 1)
        if self._config.data.answer_pattern:
            read += WRITTEN_POINTS * (tokens_read(items) + self._written(items))
        reads.add(phase, large=times * read, small=2 * times * read)

    def _read_lesson(self, reads: Reads, phase: str, num_prompts: int, steps: int, *, times: int) -> None:
        """Distillation: prompts are answered, the teacher is asked, the student learns."""
        lessons, settings = self._texts.lessons, self._config.distillation
        number = min(num_prompts or len(lessons), len(lessons))
        read, scored = tokens_read(lessons) / len(lessons), mean(map(num_answer_tokens, lessons))  # tokens of a text
        written = number if self._texts.has_prompts else 0
        drawn = num_drawn(number, settings.batch_size, steps)
        shown = min(DRIFT_TEXTS, number, 1 + MAX_DRIFT_SCORES / (self._vocab * scored))
        learnt = min(number, drawn)
        different = learnt + shown * (1 - learnt / number)
        # Of what fits into memory the teacher is asked once, of the rest again and again.
        kept = min(1.0, MAX_REMEMBERED_BYTES / (self._said_bytes() * scored * different))
        taught = written + kept * different + (1 - kept) * (shown + drawn)
        reads.add(phase, large=times * read * taught, small=times * read * (2 * taught + 3 * shown))
        students = 2 if settings.mode == "paired" and phase == "distillation" else 1
        reads.learnt += times * students * read * drawn

    def _answered(self, items: Texts, more: int = 0) -> int:
        """Tokens that a model reads to answer: as :meth:`_written`, or every choice after each prompt."""
        choices = self._texts.choices
        if not choices:
            return self._written(items, more)
        prompts = sum(len(item.prompt_ids[-self._prompt_room() :]) for item in items)
        return prompts + len(items) * (sum(choices) - len(choices))  # the last token of each is only predicted

    def _written(self, items: Texts, more: int = 0) -> int:
        """Tokens read to write answers as long as the right ones, and ``more`` tokens."""
        room, longest = self._prompt_room(), self._longest_answer() + more
        return tokens_read([TokenizedExample(item.prompt_ids[-room:], item.answer_ids[:longest]) for item in items])

    def _longest_answer(self) -> int:
        return max(self._texts.choices, default=self._config.scoring.max_new_tokens)

    def _prompt_room(self) -> int:
        """Tokens that a prompt may have before an answer."""
        longest, context = self._config.train.max_length, self._texts.context
        return longest if context is None else min(longest, context - self._longest_answer())


@dataclasses.dataclass(slots=True)
class Reads:
    """Tokens that go through the server's models in a whole run.

    Attributes:
        large: Through the large model, by phase.
        small: Through tuned and untuned together.
        learnt: Through a model that learns.
    """

    large: dict[str, float] = dataclasses.field(default_factory=dict)
    small: float = 0.0
    learnt: float = 0.0

    def add(self, phase: str, *, large: float, small: float = 0.0) -> None:
        """Add to a phase, in place."""
        self.large[phase] = self.large.get(phase, 0.0) + large
        self.small += small


def _shapes(ref: str) -> PreTrainedModel:
    return shapes_of(find_architecture(ref), ref)
