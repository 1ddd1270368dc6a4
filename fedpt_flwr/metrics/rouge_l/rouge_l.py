"""How much of the words of an answer and its reference is the same, in the same order? The metric ``rouge_l``.

ROUGE-L (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"): the longest common subsequence of the
words of both, as a share of the answer's words (precision) and of the reference's (recall); the score is their F
measure. Words are what the package ``rouge-score`` takes for them without its stemmer, runs of the letters a to z and
of digits in any case, and the scores are its scores (a test compares the two). They are computed here because that
package brings a natural-language toolkit along, of which ROUGE-L uses nothing.

``evaluate`` copies this file elsewhere before it imports it, so it imports by absolute names only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

_DESCRIPTION = "F measure of the longest common subsequence of words, the mean over all predictions."
_INPUTS = """
Args:
    predictions: Generated answers, as text.
    references: Right answers, as text.
Returns:
    rouge_l: Mean of `scores`.
    scores: 0 to 1 for each prediction; 0 where either has no word.
"""


class RougeL(evaluate.Metric):
    """Mean ROUGE-L of the predictions."""

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
            _f_measure(_words(prediction), _words(reference))
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {"rouge_l": sum(scores) / len(scores), "scores": scores}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f_measure(answer: Sequence[str], reference: Sequence[str]) -> float:
    # With precision = common / len(answer) and recall = common / len(reference), 2 P R / (P + R) is this.
    return 2 * _longest_common(answer, reference) / max(1, len(answer) + len(reference))


def _longest_common(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the usual table at a time in the bits of an integer.

    Bit i of ``row`` is 0 where the length grows from the i-th to the next word of ``first`` (Hyyrö 2004, "Bit-parallel
    LCS-length computation revisited").
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = row = (1 << len(first)) - 1
    for word in second:
        matching = row & places.get(word, 0)
        row = (row + matching | row - matching) & every
    return len(first) - row.bit_count()
