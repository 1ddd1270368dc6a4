"""Does the answer hold the right value? The metric ``contains_value`` for ``evaluate.load(<path of this file>)``.

Lenient on purpose: a model that recites everything it knows scores here and not in ``exact_match``, so the two
together tell "does not know it" from "does not understand what is asked".

``evaluate`` copies this file elsewhere before it imports it, so it imports by absolute names only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from fedpt_flwr.prompts import normalise_answer

_DESCRIPTION = "Share of predictions that contain the right value as whole words, whatever stands around it."
_INPUTS = """
Args:
    predictions: Generated answers, as text.
    references: The value that a right answer holds: "jute" where the right answer is "filter = jute ;ok".
Returns:
    contains_value: Mean of `scores`.
    scores: 1 or 0 for each prediction; an empty reference counts 0.
"""


class ContainsValue(evaluate.Metric):
    """Share of predictions that contain the right value."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        scores = [
            int(_contains(normalise_answer(prediction), normalise_answer(value)))
            for prediction, value in zip(predictions, references, strict=True)
        ]
        return {"contains_value": sum(scores) / len(scores), "scores": scores}


def _contains(text: str, value: str) -> bool:
    # Nothing on either side that makes it a part of something else: "oak" is not in "cloak", nor 5 in 3.5, 5,000 or -5.
    whole = rf"(?<![\w+-])(?<!\w[.,]){re.escape(value)}(?!\w)(?![.,-]\w)"
    return bool(value) and re.search(whole, text) is not None
