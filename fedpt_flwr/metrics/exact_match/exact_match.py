"""Is the answer the reference? The metric ``exact_match`` for ``evaluate.load(<path of this file>)``.

``evaluate`` copies this file elsewhere before it imports it, so it imports by absolute names only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from fedpt_flwr.prompts import extract_answer, normalise_answer

_DESCRIPTION = "Share of predictions that equal their reference after extraction and normalisation."
_INPUTS = """
Args:
    predictions: Generated answers, as text.
    references: Right answers, as text; the part that counts is extracted from them as from the predictions.
    answer_pattern: Regular expression for the part of an answer that counts; empty: the whole answer.
Returns:
    exact_match: Mean of `scores`.
    scores: 1 or 0 for each prediction; a prediction without a valid answer counts 0.
"""


class ExactMatch(evaluate.Metric):
    """Share of predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, *, predictions: Sequence[str], references: Sequence[str], answer_pattern: str = ""
    ) -> dict[str, Any]:
        scores = [
            int(_matches(extract_answer(prediction, answer_pattern), extract_answer(reference, answer_pattern)))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"exact_match": sum(scores) / len(scores), "scores": scores}


def _matches(prediction: str | None, reference: str | None) -> bool:
    if not prediction or reference is None:
        return False
    return normalise_answer(prediction) == normalise_answer(reference)
