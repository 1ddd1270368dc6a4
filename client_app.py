"""The device: reads the config and its own data, tunes the small model, answers. Everything else is in ``fedpt_flwr``.

``query`` introduces the device (its number, the size of its shard, the code it runs); ``train`` does one round; three
more queries are of a secure sum. A device that cannot take part answers with the sentence that says why.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext, suppress
from logging import ERROR, INFO, WARNING
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedpt_flwr.clipping import clip_update
from fedpt_flwr.config import ModelConfig, RunConfig, TuningConfig, parse_run_config
from fedpt_flwr.data import TokenizedExample, tokenize_examples
from fedpt_flwr.errors import ConfigError, DataError, DeviceError, FedPTError, ModelError, RunError
from fedpt_flwr.limits import DeviceLimits, parse_limits
from fedpt_flwr.memory import (
    UNTOLD_BASE_BYTES,
    check_fits,
    give_freed_memory_back,
    is_out_of_memory,
    keeping_freed_memory,
)
from fedpt_flwr.models import (
    cpu_threads,
    cut_adapter,
    fingerprint,
    frozen_fingerprint,
    hold_frozen_weights_in,
    load_causal_lm,
    load_tokenizer,
    make_tunable,
    pick_device,
    set_arrays,
)
from fedpt_flwr.models import tunable_arrays as arrays_of
from fedpt_flwr.prompts import Example
from fedpt_flwr.records import (
    ARRAYS,
    CONFIG,
    LIMITS,
    METRICS,
    PRIVATE_METRICS,
    DeviceCard,
    changes_of,
    check_arrays,
    check_code,
    code_hash,
    refusal,
    sent_as,
    to_array_record,
    to_int8_reply,
    to_reply,
    to_tensors,
)
from fedpt_flwr.residual import Residuals
from fedpt_flwr.secure_sum.device import Device, Sum, read_secret
from fedpt_flwr.secure_sum.rounds import SUMMED_METRICS
from fedpt_flwr.secure_sum.session import KEYS, RECORD, REVEAL, SHARES, Rules
from fedpt_flwr.sources import device_shard, local_shard, needs_tokenizer
from fedpt_flwr.training import TaskMemory, device_seed, round_learning_rate, train_locally

OUT_OF_MEMORY = (
    "it ran out of memory; lower max-batch-size in its node config, or set memory-limit-mb there, so that it says "
    "beforehand what does not fit"
)

app = ClientApp()
CODE_HASH = code_hash(Path(__file__))  # of the code that runs, whatever is edited later
task_memory = TaskMemory()
transformers_logging.disable_progress_bar()  # a log is no place for it

Handler = Callable[[Message, Context], Message]


def declines(handler: Handler) -> Handler:
    """Answer with the sentence of an error that a user can mend, instead of a traceback."""

    @functools.wraps(handler)
    def answer(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except FedPTError as error:
            log(INFO, "This device declines: %s", error)
            reason = str(error)
            if isinstance(error, DataError) and _keeps_its_texts(context):
                reason = _kept_here(context, "its data cannot be used")
            elif _is_private(context) and _may_tell_of_data(error, message):
                reason = _kept_here(context, f"it declines ({type(error).__name__})")
            return _refuse(message, context, reason)
        except Exception as error:
            if is_out_of_memory(error):
                log(ERROR, "The round failed on this device", exc_info=error)
                return _refuse(message, context, f"device {_told_number(context)}: {OUT_OF_MEMORY}")
            if not _keeps_its_texts(context):
                raise  # Flower sends its text
            log(ERROR, "The round failed on this device", exc_info=error)
            reason = _kept_here(context, f"it failed with {type(error).__name__}")
            return _refuse(message, context, reason)

    return answer


def _refuse(message: Message, context: Context, reason: str) -> Message:
    """Decline, and say what limits this device has, for the ledger."""
    content = refusal(reason)
    with suppress(DeviceError):
        content[LIMITS] = ConfigRecord(parse_limits(context.node_config, place="").to_flat())  # type: ignore[arg-type]
    return Message(content=content, reply_to=message)


def _keeps_its_texts(context: Context) -> bool:
    """Whether an error's text, which may hold examples, stays on the device."""
    return _has_own_data(context) or _is_private(context)


def _has_own_data(context: Context) -> bool:
    return context.run_config.get("data.partitioner") == "node-local"


def _may_tell_of_data(error: FedPTError, message: Message) -> bool:
    """Whether an error's text may depend on the device's data, as that of the memory which its examples need does."""
    is_known = isinstance(error, ConfigError | ModelError)
    return not (is_known or (isinstance(error, DeviceError) and message.metadata.message_type == MessageType.QUERY))


def _is_private(context: Context) -> bool:
    return context.run_config.get("privacy.dp", "off") != "off"


def _kept_here(context: Context, what: str) -> str:
    """What the server is told where an error's text may hold examples or paths of the device's own data."""
    return f"device {_told_number(context)}: {what}; the log of its ClientApp says why"


def _told_number(context: Context) -> object:
    return context.node_config.get("partition-id", context.node_config.get("device-id"))


@app.query()
@declines
def introduce(message: Message, context: Context) -> Message:
    """Say which device this is, how many examples it has, and which code it runs."""
    task_memory.begin()
    config = parse_run_config(context.run_config)
    _check_code(message)
    device = device_number(context)
    rank = load_limits(config, context).rank_of(config.tuning, place=f"device {device}")
    shard = load_shard(config, context)
    groups = Counter(example.group for example in shard) if tells_groups(config, context) else {}
    if config.privacy.is_on:  # the server learns that there is something to train on, and no more
        shard, groups = shard[:1], {}
    card = DeviceCard(
        device=device,
        num_examples=len(shard),
        groups={name: count for name, count in groups.items() if name},
        code_hash=CODE_HASH,
        lora_rank=rank,
    )
    return Message(content=card.to_content(), reply_to=message)


@app.query(KEYS.partition(".")[2])
@declines
def offer_keys(message: Message, context: Context) -> Message:
    """Offer two public keys for a round's secure sum."""
    return Message(content=_summing(context).offer_keys(message.content), reply_to=message)


@app.query(SHARES.partition(".")[2])
@declines
def share_secrets(message: Message, context: Context) -> Message:
    """Share what opens this device's masks with the other devices of the round."""
    return Message(content=_summing(context).share_secrets(message.content), reply_to=message)


@app.query(REVEAL.partition(".")[2])
@declines
def reveal_shares(message: Message, context: Context) -> Message:
    """Give the shares that open the sum of those that answered."""
    return Message(content=_summing(context).reveal(message.content), reply_to=message)


def _summing(context: Context) -> Device:
    """This device's side of a secure sum.

    Raises:
        DeviceError: The run config has none.
    """
    config, device = parse_run_config(context.run_config), device_number(context)
    if not config.privacy.secure_sum:
        raise DeviceError(
            "the server asks for a secure sum, and this device's run config has none",
            value=config.privacy.secure_sum,
            place=f"device {device}, privacy.secure-sum",
        )
    secret = read_secret(context.node_config, place=f"device {device}")
    return Device(device, Rules.of(config), context.state, secret)


def _join_sum(config: RunConfig, message: Message, context: Context, server_round: int, place: str) -> Sum | None:
    """The secure sum in which this round's change goes; None where single changes may be seen.

    Raises:
        DeviceError: There should be one, and the server asks for the change itself; or it is that of another round.
    """
    if RECORD in message.content.config_records:
        summed = _summing(context).join(message.content)
        # Learning rate and order of the examples follow from the round: one that is trained for several sums, with
        # other devices in each, gives what each of them changed.
        if not server_round == summed.session.server_round <= config.num_server_rounds:
            raise DeviceError(
                f"a device trains the round whose changes are summed, here {summed.session.server_round} of "
                f"{config.num_server_rounds}, and the server asks it to train another",
                value=server_round,
                place=f"{place}, privacy.secure-sum",
            )
        return summed
    if config.privacy.secure_sum:
        raise DeviceError(
            "this device's change goes into a secure sum or nowhere, and the server asks for it in the clear",
            place=f"{place}, privacy.secure-sum",
        )
    return None


@app.train(mods=[clip_update])
@declines
def train(message: Message, context: Context) -> Message:
    """Tune the small model on this device's shard for one round."""
    task_memory.begin()
    config = parse_run_config(context.run_config)
    _check_code(message)
    told = message.content.config_records[CONFIG]
    server_round, device = int(str(told["server-round"])), device_number(context)
    place = f"device {device}, round {server_round}"
    summed = _join_sum(config, message, context, server_round, place)
    fedprox_mu = float(str(told.get("proximal-mu", 0.0))) or config.train.fedprox_mu
    limits = load_limits(config, context)
    rank = limits.rank_of(config.tuning, place=f"device {device}")
    config = dataclasses.replace(config, train=limits.apply(config.train))
    tokenizer = cached_tokenizer(config.model.small)
    examples = _tokenized(config, context, tokenizer)
    estimate = None
    if limits.memory_limit_mb is not None:
        give_freed_memory_back()
        smaller = dataclasses.replace(config.tuning, lora_rank=rank or config.tuning.lora_rank)
        estimate = check_fits(
            dataclasses.replace(config, tuning=smaller),
            examples,
            dtype=limits.dtype or config.model.small_dtype,
            batch_size=limits.max_batch_size or config.train.batch_size,
            with_fedprox=fedprox_mu > 0,
            base_bytes=task_memory.base_bytes or UNTOLD_BASE_BYTES,
            limit_mb=limits.memory_limit_mb,
            place=place,
        )
    reusing = nullcontext() if limits.memory_limit_mb is not None else keeping_freed_memory()
    with reusing, cpu_threads(limits.threads or config.threads.device):
        model, stored, frozen = load_small_model(config.model, config.tuning, config.seed, limits.dtype, rank)
        _check_fingerprint(str(told.get("small-fingerprint", "")), stored, config)
        _check_frozen(str(told.get("frozen-fingerprint", "")), frozen)
        received = message.content.array_records[ARRAYS]
        wire = config.wire.dtype
        expected = to_array_record(arrays_of(model))
        received = check_arrays(received, expected, place=f"{place}, what the server sent", dtype=sent_as(wire))
        del expected
        set_arrays(model, to_tensors(received, sent_as(wire)))
        peak = task_memory.peak_before_training()
        result = train_locally(
            model,
            examples,
            config.train,
            learning_rate=round_learning_rate(config.train, server_round, config.num_server_rounds),
            fedprox_mu=fedprox_mu,
            pad_id=int(tokenizer.pad_token_id or 0),
            seed=device_seed(config.seed, server_round, device),
            max_batch_size=limits.max_batch_size or 0,
        )
    metrics: dict[str, int | float | list[int] | list[float]] = {
        "device": device,
        "server-round": server_round,
        "num-examples": len(examples),
        "train-loss": result.loss,
        "train-loss-last": result.loss_last,
        "num-steps": result.num_steps,
        "batch-size": min(config.train.batch_size, limits.max_batch_size or config.train.batch_size, len(examples)),
        "num-examples-seen": result.num_examples_seen,
        "num-tokens": result.num_tokens,
        "num-answer-tokens": result.num_answer_tokens,
        "seconds": result.seconds,
        "flops": result.flops,
        "state-bytes": result.state_bytes,
    }
    if result.peak_memory_bytes is not None:
        metrics["peak-memory-bytes"] = result.peak_memory_bytes
    # A simulation's workers are shared by many devices; growth means something in a process of the task's own.
    growth = None if "ray" in sys.modules else task_memory.growth_bytes(peak)
    if growth is not None:
        metrics["memory-growth-bytes"] = growth
    if estimate is not None:
        metrics["memory-estimate-bytes"] = estimate
    if config.privacy.is_on:  # all else depends on the data and would not be accounted for
        metrics = {name: metrics[name] for name in PRIVATE_METRICS} | {"num-examples": 1}
    if summed is not None:
        begun = time.perf_counter()
        changes = changes_of(arrays_of(model), received, sent_as(wire))
        update = summed.answer(changes, received, told, num_examples=len(examples), train_loss=result.loss)
        metrics = {name: value for name, value in metrics.items() if name not in SUMMED_METRICS}
        metrics["mask-seconds"] = time.perf_counter() - begun
    elif wire == "int8":
        update = _in_8_bits(model, received, told, server_round, device)
    else:
        update = to_reply(arrays_of(model), received, wire, place=place)
    content = RecordDict({ARRAYS: update, METRICS: MetricRecord(metrics)})
    if limits.to_flat():
        content[LIMITS] = ConfigRecord(limits.to_flat())  # type: ignore[arg-type]
    return Message(content=content, reply_to=message)


def _in_8_bits(
    model: PreTrainedModel | PeftModel, received: ArrayRecord, told: ConfigRecord, server_round: int, device: int
) -> ArrayRecord:
    """The answer, with what earlier ones lost if the server says of which round; what this one loses is kept."""
    used = told.get("residual-of")
    if not isinstance(used, int):
        return to_int8_reply(arrays_of(model), received, {})[0]
    residuals = Residuals(str(told.get("residual-run", "")), device)
    residual = residuals.read(used, {name: tuple(array.shape) for name, array in received.items()})
    if used and not residual:
        log(WARNING, "Device %d has not what its answer of round %d lost, and begins without", device, used)
    update, lost = to_int8_reply(arrays_of(model), received, residual)
    try:
        residuals.write(server_round, lost, keep=used)
    except RunError as error:
        log(WARNING, "Device %d: what this answer lost cannot be kept, and will not be sent later: %s", device, error)
    return update


def _tokenized(config: RunConfig, context: Context, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedExample]:
    """This device's examples in tokens; what was left out or cut is logged."""
    examples, report = tokenize_examples(load_shard(config, context), tokenizer, max_length=config.train.max_length)
    if report.num_dropped or report.num_prompts_cut or report.num_answers_cut:
        log(
            INFO,
            "Device %d: of %d examples %d are left out as empty, %d prompts and %d answers are cut",
            device_number(context),
            report.num_examples,
            report.num_dropped,
            report.num_prompts_cut,
            report.num_answers_cut,
        )
    return examples


def load_limits(config: RunConfig, context: Context) -> DeviceLimits:
    """What this device's node config allows it.

    Raises:
        DeviceError: A limit is none, or this device cannot compute in the type that it names.
    """
    device = device_number(context)
    limits = parse_limits(context.node_config, place=f"device {device}")
    if limits.dtype == "float16" and pick_device(config.model.device).type == "cpu":
        raise DeviceError(
            "float16 needs a GPU",
            value=limits.dtype,
            place=f"device {device}, node config, dtype",
            remedy='restart its SuperNode with dtype="bfloat16" or "float32" in --node-config',
        )
    return limits


def device_number(context: Context) -> int:
    """This device's stable number: ``partition-id`` of its node config, else ``device-id``.

    Raises:
        DeviceError: There is none.
    """
    for key in ("partition-id", "device-id"):
        number = context.node_config.get(key)
        if isinstance(number, int) and not isinstance(number, bool) and number >= 0:
            return number
    raise DeviceError(
        "a device needs a number, a whole one from 0",
        value=sorted(context.node_config),  # the names alone: a value may be the path of its data
        place=f"node {context.node_id}",
        remedy="start its SuperNode with --node-config 'device-id=0', another number for each",
    )


def load_shard(config: RunConfig, context: Context) -> list[Example]:
    """This device's examples: its own file or folder, or its part of the run's training data.

    Raises:
        DeviceError: The node config lacks what says where they are.
        DataError: They cannot be read.
    """
    device = device_number(context)
    tokenizer = cached_tokenizer(config.model.small) if needs_tokenizer(config.data) else None
    if config.data.partitioner == "node-local":
        path = context.node_config.get("data-path")
        if not isinstance(path, str) or not path:
            raise DeviceError(
                "with data.partitioner='node-local' a device needs the path of its data",
                place=f"device {device}",
                remedy="start its SuperNode with --node-config 'data-path=\"/absolute/path.jsonl\"'",
            )
        with_groups = tells_groups(config, context)
        return local_shard(config.data, path, tokenizer=tokenizer, with_groups=with_groups)
    num_devices = context.node_config.get("num-partitions")
    if not isinstance(num_devices, int) or not device < num_devices:
        raise DeviceError(
            "a device needs num-partitions, more than its own number",
            value=num_devices,
            place=f"device {device}",
            remedy="start its SuperNode with --node-config 'partition-id=0 num-partitions=8'",
        )
    return device_shard(config.data, device=device, num_devices=num_devices, seed=config.seed, tokenizer=tokenizer)


def tells_groups(config: RunConfig, context: Context) -> bool:
    """Whether the server learns how many examples of which group this device has.

    Both must allow it: the run (``data.disclose``), and the device (``disclose`` of its node config), which says
    nothing of data of its own unless its operator wants it to.

    Raises:
        DeviceError: The node config says something else.
    """
    allowed = context.node_config.get("disclose", "size" if _has_own_data(context) else "groups")
    if allowed not in ("size", "groups"):
        raise DeviceError(
            "must be size or groups",
            value=allowed,
            place=f"device {device_number(context)}, node config, disclose",
            remedy='restart its SuperNode with disclose="size" in --node-config, or without',
        )
    return config.data.disclose == "groups" and allowed == "groups"


@functools.lru_cache(maxsize=1)
def load_small_model(
    model: ModelConfig, tuning: TuningConfig, seed: int, dtype: str | None, rank: int = 0
) -> tuple[PreTrainedModel | PeftModel, str, str]:
    """The small model ready to be tuned, and the fingerprints of what this device has stored and drawn.

    One process keeps one: every round overwrites all that tuning changes. It is loaded as the server loads it, to be
    compared, and then held in the device's own ``dtype`` where its weights are frozen. An adapter is drawn as the
    server draws it, and then cut to the device's own ``rank``, if that is not 0.
    """
    small = load_causal_lm(model.small, dtype=model.small_dtype, device=model.device)
    stored = fingerprint(small)
    base = list(small.parameters())
    tunable = make_tunable(small, tuning, seed=seed)
    frozen = frozen_fingerprint(tunable)
    if dtype is not None and tuning.mode == "lora":
        hold_frozen_weights_in(base, dtype)  # not those of the adapter, which are drawn in float32
    if rank:
        cut_adapter(tunable, rank)
    return tunable, stored, frozen


cached_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)


def _check_fingerprint(expected: str, stored: str, config: RunConfig) -> None:
    if expected and stored != expected:
        raise ModelError(
            "server and device must have the same small model; their weights differ",
            value=config.model.small,
            place="model.small",
            remedy="copy the server's folder to the device, or name a commit of the hub, as in owner/name@commit",
        )


def _check_frozen(expected: str, drawn: str) -> None:
    if expected and drawn != expected:
        raise ModelError(
            "server and device must draw the same first matrices of the adapter, which are never sent; theirs differ",
            value=drawn,
            place="tuning.lora-aggregation",
            remedy="install the same version of torch on both, or set tuning.lora-aggregation='exact'",
        )


def _check_code(message: Message) -> None:
    expected = message.content.config_records.get(CONFIG, ConfigRecord()).get("code-hash", "")
    if expected:
        check_code(str(expected), CODE_HASH)
