"""Proxy-tuning as its definition reads: the slow and obvious version that the fast ones are compared with.

No cache, no batching, no masks: three full forward passes per token, on one sequence at a time. And adapters as what
they are added to a model as.
"""

import numpy as np
import torch
from torch import Tensor

from fedpt_flwr.lora import is_left, is_right


def products(arrays):
    """``B A`` of each module of an adapter, formed, in float64."""

    def of_modules(is_factor):
        chosen = {name: values for name, values in arrays.items() if is_factor(name)}
        return {name.replace(".lora_A", ".lora").replace(".lora_B", ".lora"): chosen[name] for name in chosen}

    lefts, rights = of_modules(is_left), of_modules(is_right)
    return {module: lefts[module].astype(np.float64) @ rights[module].astype(np.float64) for module in rights}


@torch.no_grad()
def reference_scores(
    large, tuned, untuned, ids: Tensor, *, alpha: float = 1.0, plausibility: float = 0.0, vocab_size: int | None = None
) -> Tensor:
    """Scores of the next token at every position, ``(seq, vocab)``, float32, for ``ids`` of shape ``(seq,)``."""
    of_large, of_tuned, of_untuned = (
        model(ids[None], use_cache=False).logits[0, :, :vocab_size].float() for model in (large, tuned, untuned)
    )
    scores = of_large + alpha * (of_tuned - of_untuned)
    if plausibility:
        probabilities = of_tuned.double().softmax(-1)
        best = probabilities.max(-1, keepdim=True).values
        scores = scores.masked_fill(probabilities < plausibility * best, -torch.inf)
    return scores


def reference_greedy(large, tuned, untuned, prompt: Tensor, *, max_new_tokens: int, **settings) -> list[int]:
    """The new tokens of greedy decoding from ``prompt``, ``(seq,)``, without a stop at any token."""
    ids = prompt
    for _ in range(max_new_tokens):
        next_id = reference_scores(large, tuned, untuned, ids, **settings)[-1].argmax()
        ids = torch.cat([ids, next_id[None]])
    return ids[len(prompt) :].tolist()


def reference_beams(
    large, tuned, untuned, prompt: Tensor, *, num_beams: int, max_new_tokens: int, **settings
) -> list[int]:
    """The new tokens of the best beam, by summed log-probability; all beams have the same length."""
    beams = [(0.0, prompt)]
    for _ in range(max_new_tokens):
        grown = []
        for total, ids in beams:
            log_probabilities = reference_scores(large, tuned, untuned, ids, **settings)[-1].log_softmax(-1)
            values, tokens = log_probabilities.topk(num_beams)
            grown += [
                (total + value.item(), torch.cat([ids, token[None]]))
                for value, token in zip(values, tokens, strict=True)
            ]
        beams = sorted(grown, key=lambda beam: beam[0], reverse=True)[:num_beams]
    return beams[0][1][len(prompt) :].tolist()
