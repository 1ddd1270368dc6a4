"""Local training: what one device does with the small model in one round.

Answer tokens only, AdamW begun anew each round, batches drawn by a generator that depends on (seed, round, device) and
on nothing else, so that a result is the same however many devices share a process. Knows no messages and no Flower.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import functional as F

from fedpt_flwr.config import TrainConfig
from fedpt_flwr.data import IGNORED_LABEL, TokenizedExample, batches, collate, collate_packed
from fedpt_flwr.errors import DataError, DeviceError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LocalResult:
    """What one round on one device measured; the weights are in the model.

    Attributes:
        loss: Mean over the steps of nats per answer token.
        loss_last: The same for the last step alone.
        num_steps: Optimizer steps.
        num_examples_seen: Examples that went through the model, repeats counted.
        num_tokens: Tokens that went through the model, padding not counted.
        num_answer_tokens: Tokens that had a loss.
        seconds: Time of the steps.
        flops: Floating-point operations, counted from the sizes of the weights; see :func:`count_flops`.
        state_bytes: Bytes of weights, gradients and optimizer state.
        peak_memory_bytes: Peak of the process's memory over the task (CUDA: of the allocator); None if the system
            does not tell.
    """

    loss: float
    loss_last: float
    num_steps: int
    num_examples_seen: int
    num_tokens: int
    num_answer_tokens: int
    seconds: float
    flops: float
    state_bytes: int
    peak_memory_bytes: int | None


def round_learning_rate(config: TrainConfig, server_round: int, num_rounds: int) -> float:
    """The learning rate of a round: the schedule runs over the rounds, not within one.

    Args:
        config: Gives the first rate, the last as a fraction of it, and the course between them.
        server_round: From 1.
        num_rounds: Rounds of the run.
    """
    progress = min(1.0, (server_round - 1) / (num_rounds - 1)) if num_rounds > 1 else 0.0
    falling = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    factor = falling[config.schedule]
    return config.learning_rate * (config.learning_rate_end + (1.0 - config.learning_rate_end) * factor)


def device_seed(seed: int, server_round: int, device: int) -> int:
    """The seed of one device's randomness in one round."""
    return int(np.random.SeedSequence([seed, server_round, device]).generate_state(1, np.uint32)[0])


def num_steps(config: TrainConfig, num_examples: int) -> int:
    """Optimizer steps of a round: the epochs or the bound, whichever ends first."""
    per_epoch = math.ceil(math.ceil(num_examples / config.batch_size) / config.accumulation_steps)
    limits = [config.epochs * per_epoch, config.max_steps]
    return min(limit for limit in limits if limit > 0)


def train_locally(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[TokenizedExample],
    config: TrainConfig,
    *,
    learning_rate: float,
    fedprox_mu: float,
    pad_id: int,
    seed: int,
    max_batch_size: int = 0,
) -> LocalResult:
    """Tune a model in place on one device's shard.

    Args:
        model: The small model with the round's weights; what has ``requires_grad`` is tuned, where the model lies.
        examples: The shard.
        config: Steps, batches and optimizer.
        learning_rate: Of this round.
        fedprox_mu: FedProx's pull towards the weights that the round began with (Li et al. 2020, arXiv:1812.06127).
        pad_id: Id that fills up batches.
        seed: Of batches and dropout.
        max_batch_size: Examples per forward pass that this device can bear; 0: as many as the config says. Larger
            batches are passed in pieces whose gradients are added, so that a step learns from the same examples.

    Returns:
        Losses and costs.

    Raises:
        DataError: The shard is empty.
        DeviceError: The loss is not a finite number, or this device cannot compute in the type that is asked for.
        ModelError: Examples are to be packed, and the model cannot keep them apart.
    """
    if not examples:
        raise DataError("a device needs at least one example to train on")
    device = next(model.parameters()).device
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise DeviceError(
            "fp16 needs a GPU",
            value=config.mixed_precision,
            place="train.mixed-precision",
            remedy="use bf16 or no on a CPU",
        )
    if config.packing:
        check_packing(model)
    memory = _PeakMemory(device)
    accelerator = _accelerator(config, device)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    begun_with = [weight.detach().clone() for weight in weights] if fedprox_mu > 0 else []
    optimizer = torch.optim.AdamW(
        weights,
        lr=learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # the line above may have enabled it; twice would leave a hook behind
        model.enable_input_require_grads()
    steps = num_steps(config, len(examples))
    draws = batches(len(examples), config.batch_size, steps * config.accumulation_steps, np.random.default_rng(seed))
    losses: list[float] = []
    seen = tokens = answer_tokens = state_bytes = 0
    started = time.perf_counter()
    model.train()
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        # Not the model: prepared once, it would never be prepared again, for no other precision and no other round.
        prepared_optimizer = accelerator.prepare(optimizer)
        try:
            for _ in range(steps):
                pieces = [
                    [examples[index] for index in piece]
                    for _ in range(config.accumulation_steps)
                    for piece in _pieces(next(draws), max_batch_size)
                ]
                seen += sum(map(len, pieces))
                tokens += sum(len(item.prompt_ids) + len(item.answer_ids) for piece in pieces for item in piece)
                step = [(collate_packed if config.packing else collate)(piece, pad_id) for piece in pieces]
                count = sum(int((batch["labels"][:, 1:] != IGNORED_LABEL).sum()) for batch in step)
                total = 0.0
                for batch in step:
                    with accelerator.autocast():
                        loss = _answer_loss(model, {name: part.to(device) for name, part in batch.items()}) / count
                    accelerator.backward(loss)
                    total += loss.item()
                if not math.isfinite(total):
                    raise DeviceError(
                        f"the training loss became {total} after {len(losses)} steps",
                        remedy="lower train.learning-rate, or train.max-grad-norm",
                    )
                # In float16 the gradients are still multiplied by the loss scale here.
                scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0
                for weight, start in zip(weights, begun_with, strict=False):
                    if weight.grad is not None:
                        weight.grad.add_(weight.detach() - start, alpha=fedprox_mu * scale)
                if config.max_grad_norm > 0:
                    accelerator.clip_grad_norm_(weights, config.max_grad_norm)
                prepared_optimizer.step()
                if not losses:
                    state_bytes = _state_bytes(model, weights, optimizer)
                prepared_optimizer.zero_grad()
                losses.append(total)
                answer_tokens += count
        finally:
            optimizer.zero_grad()  # after an error too: the next task of this process may get the same model
            if config.gradient_checkpointing:
                model.disable_input_require_grads()
                model.gradient_checkpointing_disable()
            model.eval()
    return LocalResult(
        loss=sum(losses) / len(losses),
        loss_last=losses[-1],
        num_steps=steps,
        num_examples_seen=seen,
        num_tokens=tokens,
        num_answer_tokens=answer_tokens,
        seconds=time.perf_counter() - started,
        flops=count_flops(model, tokens),
        state_bytes=state_bytes,
        peak_memory_bytes=memory.peak_bytes(),
    )


_MOST_LEAKED = 0.05


@torch.no_grad()
def check_packing(model: PreTrainedModel | PeftModel) -> None:
    """Make sure that a model reads examples in one row as it reads each alone.

    Not by a list of models or of kinds of attention: a short text is read alone, behind another one with positions of
    its own, and behind it as its continuation. The second must be like the first, not like the third.

    Raises:
        ModelError: It is not.
    """
    device = next(model.parameters()).device
    first, second = torch.arange(1, 9, device=device)[None], torch.arange(4, 8, device=device)[None]
    both = torch.cat([first, second], dim=1)
    apart = torch.cat([torch.arange(8, device=device), torch.arange(4, device=device)])[None]
    was_training = model.training
    model.eval()
    try:
        alone = model(input_ids=second, use_cache=False).logits.float()
        joined = model(input_ids=both, use_cache=False).logits[:, 8:].float()
        packed = model(input_ids=both, position_ids=apart, use_cache=False).logits[:, 8:].float()
        leaks = bool((packed - alone).abs().max() > _MOST_LEAKED * (joined - alone).abs().max())
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # it takes no positions
        leaks = True
    finally:
        model.train(was_training)
    if leaks:
        raise ModelError(
            "this model cannot keep examples in one row apart",
            value=f"{model.config.model_type} with attention {model.config._attn_implementation!r}",
            remedy="set train.packing=false",
        )


def _pieces(indices: list[int], size: int) -> list[list[int]]:
    """A batch in pieces of at most ``size``, 0 for one piece."""
    return [indices[begin : begin + size] for begin in range(0, len(indices), size)] if size else [indices]


def count_flops(model: torch.nn.Module, num_tokens: float) -> float:
    """Operations of training on a number of tokens, from the sizes of the weight matrices.

    Two per weight and token forward, two for the gradients that go down, two for the gradients of the weights that are
    tuned; attention over the context is not counted (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). The scores of
    prompts are counted, although none are computed.
    """
    forward, tuned = _matrix_weights(model)
    return float(num_tokens) * (2 * forward + 2 * forward + 2 * tuned)


def count_forward_flops(model: torch.nn.Module, num_tokens: float) -> float:
    """Operations of reading a number of tokens: the first of the terms of :func:`count_flops`."""
    forward, _ = _matrix_weights(model)
    return float(num_tokens) * 2 * forward


def _matrix_weights(model: torch.nn.Module) -> tuple[int, int]:
    """Weights in the matrices that tokens are multiplied with, and how many of them are tuned."""
    forward = tuned = 0
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, torch.nn.Embedding)}
    for weight in model.parameters():
        if weight.dim() < 2 or (id(weight) in embeddings and not _is_tied(model, weight)):
            continue
        forward += weight.numel()
        tuned += weight.numel() if weight.requires_grad else 0
    return forward, tuned


def _is_tied(model: torch.nn.Module, weight: Tensor) -> bool:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return output is not None and output.weight is weight


def _answer_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sum of nats over the answer tokens of a batch.

    Scores are computed from where the first answer is predicted: with the vocabulary of a real model those of the
    prompts would be most of what a device has to hold.
    """
    read = {name: part for name, part in batch.items() if name != "labels"}
    answered = (batch["labels"][:, 1:] != IGNORED_LABEL).any(dim=0).nonzero()
    targets = batch["labels"][:, 1 + int(answered[0]) :]
    counted = targets != IGNORED_LABEL
    # Decoder-only LMs of transformers 5 take `logits_to_keep`; one of another origin may ignore it, hence the slice.
    logits = model(**read, logits_to_keep=targets.shape[1] + 1, use_cache=False).logits[:, -targets.shape[1] - 1 : -1]
    return F.cross_entropy(logits[counted].float(), targets[counted], reduction="sum")


def _accelerator(config: TrainConfig, device: torch.device) -> Accelerator:
    # Accelerate keeps one state per process; devices with other settings may share it in a simulation.
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        mixed_precision=config.mixed_precision, cpu=device.type == "cpu", device_placement=False, log_with=None
    )


def _state_bytes(model: torch.nn.Module, weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
    tensors = [*model.parameters(), *(weight.grad for weight in weights if weight.grad is not None)]
    tensors += [part for state in optimizer.state.values() for part in state.values() if isinstance(part, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _PeakMemory:
    """Peak memory since its creation: CUDA's allocator, or the process's resident memory on Linux."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _forget_peak()

    def peak_bytes(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_bytes("VmHWM")


class TaskMemory:
    """How much a process's memory grows over its first task: what the task needs beyond Python and its libraries.

    Later tasks find models and freed memory of earlier ones, so only the first one is told apart from them.
    """

    def __init__(self) -> None:
        self._tasks = 0
        self._before: int | None = None
        self.base_bytes: int | None = None
        """Resident when the first task began: Python, its libraries, the message; None where it cannot be told."""

    def begin(self) -> None:
        """A task begins, nothing of it is loaded yet."""
        self._tasks += 1
        _forget_peak()
        if self._tasks == 1:
            self._before = self.base_bytes = _resident_bytes("VmRSS")
        else:
            self._before = None

    def peak_before_training(self) -> int | None:
        """The peak so far, in bytes: :func:`train_locally` forgets it, to take one of its own."""
        return _resident_bytes("VmHWM")

    def growth_bytes(self, earlier_peak: int | None) -> int | None:
        """From the memory at the beginning to the highest peak; None where it cannot be told."""
        peaks = [peak for peak in (earlier_peak, _resident_bytes("VmHWM")) if peak is not None]
        return None if self._before is None or not peaks else max(0, max(peaks) - self._before)


def _forget_peak() -> None:
    """Let ``VmHWM`` begin anew; where that is not allowed, it stays the peak of the whole process."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        with suppress(OSError):
            reset.write_text("5", encoding="ascii")  # 5: the peak of resident memory


def _resident_bytes(name: str) -> int | None:
    """Resident memory of this process on Linux: ``VmRSS`` now, ``VmHWM`` at its peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
