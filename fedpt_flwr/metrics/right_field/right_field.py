"""Is the answer about what was asked? The metric ``right_field`` for ``evaluate.load(<path of this file>)``.

For answers of the form ``field = value``, whether or not the value is right.

``evaluate`` copies this file elsewhere before it imports it, so it imports by absolute names only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from fedpt_flwr.prompts import normalise_answer

_DESCRIPTION = "Share of predictions whose part before the first ' = ' is the right field."
_INPUTS = """
Args:
    predictions: Generated answers, as text.
    references: The right field: "filter" where the right answer is "filter = jute ;ok".
Returns:
    right_field: Mean of `scores`.
    scores: 1 or 0 for each prediction; one without " = " counts 0.
"""


class RightField(evaluate.Metric):
    """Share of predictions that name the right field."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: Sequence[str], references: Sequence[str]) -> dict[str, Any]:
        scores = [int(_names(prediction, field)) for prediction, field in zip(predictions, references, strict=True)]
        return {"right_field": sum(scores) / len(scores), "scores": scores}


def _names(prediction: str, field: str) -> bool:
    before, equals, _ = prediction.partition(" = ")
    return bool(equals) and normalise_answer(before) == normalise_answer(field)
