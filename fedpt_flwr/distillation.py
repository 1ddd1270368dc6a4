"""Distillation: a small model learns to predict what a teacher predicts, on public text.

The teacher is a callable that gives scores for the answer tokens of some texts; nothing here knows which models it is
made of, nor rounds or messages. The loss is the KL divergence over the whole vocabulary, from soft targets (Hinton et
al. 2015, arXiv:1503.02531), at the answer tokens alone.

Two students can learn side by side (``paired``): the tuned one from the proxy, the untuned one from the large model
less what the proxy leaves out of the shift, ``large - (1 - alpha) * (tuned - untuned)``, so that their difference is
the shift again. Their errors would not cancel in ``large + alpha * (tuned - untuned)``, so a third term keeps that sum
where the proxy was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpt_flwr.config import DistillationConfig
from fedpt_flwr.data import IGNORED_LABEL, TokenizedExample, batches, collate
from fedpt_flwr.errors import RoundError
from fedpt_flwr.logits import kl_divergence
from fedpt_flwr.models import input_device

_BETAS = (0.9, 0.99)
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class Targets:
    """What a teacher says about the answer tokens of some texts, in their order.

    Attributes:
        proxy: Scores that the (tuned) student learns, ``(tokens, vocab)``; -inf where a token must not come.
        large: The large model's scores, the same shape.
        untuned: Scores that an untuned student learns, the same shape; None: ``large``.
    """

    proxy: Tensor
    large: Tensor
    untuned: Tensor | None = None

    def split(self, lengths: Sequence[int]) -> list[Targets]:
        """Text by text, by the number of their answer tokens; views."""
        untuned = [None] * len(lengths) if self.untuned is None else self.untuned.split(lengths)
        return [
            Targets(*parts) for parts in zip(self.proxy.split(lengths), self.large.split(lengths), untuned, strict=True)
        ]

    @staticmethod
    def join(parts: Sequence[Targets]) -> Targets:
        """One behind the other; either all of them have a target for an untuned student or none."""
        untuned = [part.untuned for part in parts if part.untuned is not None]
        return Targets(
            torch.cat([part.proxy for part in parts]),
            torch.cat([part.large for part in parts]),
            torch.cat(untuned) if untuned else None,
        )

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [tensor for tensor in (self.proxy, self.large, self.untuned) if tensor is not None]


Teacher = Callable[[Sequence[int]], Targets]
"""Called with indices of the texts; gives the targets of their answer tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationResult:
    """What a distillation measured; the weights are in the students.

    Attributes:
        num_steps: Optimizer steps.
        kl_first: KL divergence of the (tuned) student from the teacher in the first step, nats per answer token; in the
            direction that is learnt.
        kl_last: The same, mean over the last tenth of the steps.
        seconds: Time of the steps.
    """

    num_steps: int
    kl_first: float
    kl_last: float
    seconds: float


def distil(
    student: PreTrainedModel,
    texts: Sequence[TokenizedExample],
    teacher: Teacher,
    config: DistillationConfig,
    *,
    trainable: Sequence[str],
    num_steps: int,
    learning_rate: float,
    pad_id: int,
    vocab_size: int,
    seed: int,
    untuned: PreTrainedModel | None = None,
    alpha: float = 1.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> DistillationResult:
    """Teach a model in place.

    Args:
        student: Learns the teacher's ``proxy`` scores; without dropout.
        texts: What to learn on; tokens of the answers count.
        teacher: Scores of those texts.
        config: Batch size, temperature, direction, gamma.
        trainable: Names of the weights that change.
        num_steps: Optimizer steps (AdamW).
        learning_rate: Constant over the steps.
        pad_id: Id that fills up batches.
        vocab_size: Only the first so many scores are tokens.
        seed: Of the batches.
        untuned: A second student, which learns the teacher's ``untuned`` scores; None: there is none.
        alpha: Strength of the shift by which the two students decode.
        on_progress: Called with the steps done and of all.

    Raises:
        RoundError: The loss is not a finite number.
    """
    students = [student] if untuned is None else [student, untuned]
    draws = batches(len(texts), config.batch_size, num_steps, np.random.default_rng(seed))
    divergences: list[float] = []
    started = time.perf_counter()
    with _learning(students, trainable) as weights:
        fused = weights[0].device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=_BETAS, weight_decay=0.0, fused=fused)
        for step, chosen in enumerate(draws, 1):
            batch = collate([texts[index] for index in chosen], pad_id)
            targets = teacher(chosen)
            scores = [answer_scores(model, batch, vocab_size=vocab_size) for model in students]
            pair = (targets.proxy, scores[0]) if config.direction == "forward" else (scores[0], targets.proxy)
            loss = kl_divergence(*pair, temperature=config.temperature).mean()
            divergences.append(loss.item())
            if untuned is not None:
                wanted = targets.large if targets.untuned is None else targets.untuned
                loss = loss + kl_divergence(wanted, scores[1], temperature=config.temperature).mean()
                together = targets.large + alpha * scores[0] - alpha * scores[1]
                loss = loss + config.gamma * kl_divergence(targets.proxy, together).mean()
            if not torch.isfinite(loss):
                raise RoundError(
                    f"the distillation's loss became {loss.item()} after {step - 1} steps",
                    place="distillation.learning-rate",
                    remedy="lower it, or set distillation.mode='off'",
                )
            loss.backward()
            nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if on_progress is not None:
                on_progress(step, num_steps)
    return DistillationResult(
        num_steps=num_steps,
        kl_first=divergences[0],
        kl_last=float(np.mean(divergences[-max(1, num_steps // 10) :])),
        seconds=time.perf_counter() - started,
    )


def answer_scores(model: PreTrainedModel, batch: dict[str, Tensor], *, vocab_size: int) -> Tensor:
    """A model's scores of the answer tokens of a batch.

    Args:
        model: Any causal LM.
        batch: What :func:`fedpt_flwr.data.collate` makes.
        vocab_size: Only the first so many scores are tokens.

    Returns:
        ``(tokens, vocab_size)``, text by text in the batch's order, float32, on the model's device.
    """
    device = input_device(model)
    counted = batch["labels"][:, 1:] != IGNORED_LABEL
    kept = counted.shape[1] - int(counted.any(0).int().argmax())  # what comes before any answer is not scored
    inputs = {name: batch[name][:, :-1].to(device) for name in ("input_ids", "attention_mask")}
    scores: Tensor = model(**inputs, logits_to_keep=kept, use_cache=False).logits[:, -kept:]
    return scores[counted[:, -kept:].to(device)][:, :vocab_size].float()


def num_answer_tokens(text: TokenizedExample) -> int:
    """Tokens of a text that have a target: those of its answer, but for a first token that nothing comes before."""
    return len(text.answer_ids) if text.prompt_ids else len(text.answer_ids) - 1


def remembering(teacher: Teacher, texts: Sequence[TokenizedExample], *, max_bytes: int) -> Teacher:
    """A teacher that is asked once per text, as long as its answers fit into memory; texts beyond that again and again.

    Args:
        teacher: The one that computes.
        texts: What it is asked about.
        max_bytes: Bytes of targets to keep.
    """
    kept: dict[int, Targets] = {}
    room = max_bytes

    def remember(indices: Sequence[int]) -> Targets:
        nonlocal room
        missing = [index for index in indices if index not in kept]
        fresh: dict[int, Targets] = {}
        if missing:
            lengths = [num_answer_tokens(texts[index]) for index in missing]
            for index, targets in zip(missing, teacher(missing).split(lengths), strict=True):
                fresh[index] = targets
                size = sum(tensor.numel() * tensor.element_size() for tensor in targets.tensors())
                if size <= room:
                    # A copy: a slice would keep the whole batch alive.
                    kept[index] = Targets(*(tensor.clone() for tensor in targets.tensors()))
                    room -= size
        return Targets.join([kept.get(index) or fresh[index] for index in indices])

    return remember


@contextmanager
def _learning(models: Sequence[PreTrainedModel], trainable: Sequence[str]) -> Iterator[list[nn.Parameter]]:
    """The weights that change, with gradients for as long as the context lasts."""
    names = set(trainable)
    weights = [weight for model in models for name, weight in model.named_parameters() if name in names]
    for model in models:
        model.requires_grad_(False).eval()
    for weight in weights:
        weight.requires_grad_(True)
    try:
        yield weights
    finally:
        for weight in weights:
            weight.requires_grad_(False)
            weight.grad = None
