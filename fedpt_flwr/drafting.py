"""How many tokens to draft: as many as pay, from what has been accepted so far and what the models' passes cost.

A round of speculative decoding drafts ``k`` tokens and gets up to ``k + 1``. With independent acceptance ``a`` of each
draft it gets ``1 + a + … + a**k`` on average (Leviathan et al. 2023, arXiv:2211.17192), and costs one pass of the large
and one of the untuned model over ``k + 1`` tokens, and ``k + 1`` passes of the tuned model over one; or, where weights
rounded to bfloat16 can guess, ``k`` passes of these and one of the tuned model over all. Drafting nothing is one of the
choices, so that a drafter which is always wrong costs next to nothing.

None of this has a say in which tokens come out, only in how fast.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from fedpt_flwr.models import max_positions
from fedpt_flwr.ragged import Stepper
from fedpt_flwr.vocabulary import any_id

LONGEST_DRAFT = 7
"""Tokens drafted at most: even good drafters gain little beyond that, and of one text eight are verified, for which
there are loops (``few_rows.py``)."""

_MOST_AT_ONCE = 64
"""Tokens of all rows that are verified in one pass at most; wider passes are bound by arithmetic and gain nothing."""

_SLOW_S = 0.05
"""A pass that takes so long is timed twice, and others three times."""

_ROUGH = "rough"  # what the tuned model's rough step function is called beside the three

_NUM_RECENT = 5
"""Rounds of which the quickest tells what a round costs beyond its passes: the machine does other things, too."""

_FORGETTING = 0.9
_PRIOR_WEIGHT = 3.0
_LIKELY = 0.7
"""The acceptance that is assumed before anything is known."""


class Acceptance:
    """A running estimate of how probably a draft is accepted.

    Args:
        prior: Where it begins.

    Attributes:
        rate: The estimate, between 0 and 1.
    """

    __slots__ = ("_good", "_judged")

    def __init__(self, prior: float = _LIKELY) -> None:
        self._good = prior * _PRIOR_WEIGHT
        self._judged = _PRIOR_WEIGHT

    @property
    def rate(self) -> float:
        """Between 0 and 1."""
        return self._good / self._judged

    def observe(self, num_accepted: int, num_drafts: int) -> None:
        """Take up a round: what comes behind the first refused draft was not judged."""
        self._good = _FORGETTING * self._good + num_accepted
        self._judged = _FORGETTING * self._judged + num_accepted + (num_accepted < num_drafts)


class StepCosts:
    """What a pass of each model costs, by the number of tokens in it; timed when first asked for.

    Passes over 1, 2, 4, 5, 8, 16, 32 … tokens are timed on a cache of its own and those between are interpolated: what
    counts is where the cost begins to rise with the number of tokens, and that differs between machines, dtypes and
    packings. Behind four it may jump, because rows are often multiplied in blocks of four.

    A round takes longer than its passes: keys and values of the text so far are read in each, those of every row, and
    the passes that are timed have short texts in few rows. On a CPU real rounds tell by how much, as a share of what
    the same passes over one token of each row cost; on a GPU it is little, and a remote model's passes are seen anyway.

    Args:
        steps: A step function for each of ``large``, ``tuned`` and ``untuned``.

    Attributes:
        steps: What is timed from now on; those of models alike may take their place, and what is known stays.
    """

    def __init__(self, steps: Mapping[str, Stepper]) -> None:
        self.steps = steps
        self._timed: dict[tuple[str, int], float] = {}
        # The shares in recent rounds, by the number of binary digits of the number of rows.
        self._beyond: dict[int, deque[float]] = {}

    def seconds(self, name: str, num_tokens: int) -> float:
        """Of one pass of a model over so many tokens of all rows together."""
        low = 5 if 5 <= num_tokens < 8 else 1 << (num_tokens.bit_length() - 1)
        if low == num_tokens:
            return self._timing(name, low)
        high = 8 if low == 5 else 2 * low
        below, above = self._timing(name, low), self._timing(name, high)
        return below + (above - below) * (num_tokens - low) / (high - low)

    def of_round(self, num_rows: int, num_drafts: int) -> float:
        """Seconds of a round that drafts so many tokens for each of so many rows."""
        timed = self._of_passes(num_rows, num_drafts)
        if not (beyond := self._beyond.get(num_rows.bit_length())):
            return timed
        return timed + max(0.0, min(beyond)) * self._of_single_tokens(num_rows, num_drafts)

    def observe(self, num_rows: int, num_drafts: int, seconds: float) -> None:
        """Take up what a round took that drafted so many tokens for each of so many rows."""
        if all(not step.is_remote and step.device.type == "cpu" for step in self.steps.values()):
            beyond = self._beyond.setdefault(num_rows.bit_length(), deque(maxlen=_NUM_RECENT))
            timed = self._of_passes(num_rows, num_drafts)
            beyond.append((seconds - timed) / self._of_single_tokens(num_rows, num_drafts))

    def _of_single_tokens(self, num_rows: int, num_drafts: int) -> float:
        """What as many passes as a round has would cost if each were over one token of each row."""
        large, tuned, untuned = (self.seconds(name, num_rows) for name in ("large", "tuned", "untuned"))
        return large + untuned + (num_drafts + 1) * tuned

    def _of_passes(self, num_rows: int, num_drafts: int) -> float:
        verified = num_rows * (num_drafts + 1)
        drafting = min(self._exact_drafting(num_rows, num_drafts), self._rough_drafting(num_rows, num_drafts))
        judging = self.seconds("large", verified), self.seconds("untuned", verified)
        if not all(step.runs_beside for step in self.steps.values()):
            return drafting + sum(judging)
        return drafting + max(judging) if num_drafts else max(drafting, *judging)  # as speculative.ask() launches them

    def drafts_roughly(self, num_rows: int, num_drafts: int) -> bool:
        """Whether it is cheaper to guess roughly and to read all guesses again (``speculative.draft``)."""
        rough = self._rough_drafting(num_rows, num_drafts)
        return math.isfinite(rough) and rough < self._exact_drafting(num_rows, num_drafts)  # else nothing is timed

    def _exact_drafting(self, num_rows: int, num_drafts: int) -> float:
        return (num_drafts + 1) * self.seconds("tuned", num_rows)

    def _rough_drafting(self, num_rows: int, num_drafts: int) -> float:
        if not num_drafts or self.steps["tuned"].rough is None:
            return math.inf
        return num_drafts * self.seconds(_ROUGH, num_rows) + self.seconds("tuned", num_rows * (num_drafts + 1))

    def _timing(self, name: str, num_tokens: int) -> float:
        rough = self.steps["tuned"].rough if name == _ROUGH else None
        step = rough or self.steps[name]
        if step.is_remote:  # a pass costs money, and what it takes is seen from those that are made anyway
            return float(step.model.seconds(num_tokens))
        if (name, num_tokens) not in self._timed:
            self._timed[name, num_tokens] = _time_pass(step, num_tokens)
        return self._timed[name, num_tokens]


class DraftLength:
    """Chooses the draft length of every round.

    Args:
        costs: Of the models' passes.

    Attributes:
        costs: These.
        prior: The acceptance that a new text begins with: that of those before it.
    """

    def __init__(self, costs: StepCosts) -> None:
        self.costs = costs
        self.prior = _LIKELY

    def choose(self, texts: Sequence[Acceptance], longest: int) -> int:
        """The number of drafts that gives the most tokens per second.

        Args:
            texts: Of each row that takes part.
            longest: No more than this makes sense.
        """
        num_rows = len(texts)
        longest = min(longest, LONGEST_DRAFT, max(1, _MOST_AT_ONCE // num_rows - 1))
        rates = [text.rate for text in texts]
        best, best_speed = 0, 0.0
        for num_drafts in range(max(longest, 0) + 1):
            gained = sum(expected_tokens(rate, num_drafts) for rate in rates)
            speed = gained / self.costs.of_round(num_rows, num_drafts)
            if speed > best_speed:
                best, best_speed = num_drafts, speed
            elif speed < 0.8 * best_speed:  # it has one peak; passes that cannot pay need not be timed
                break
        return best

    def measure(self) -> None:
        """Time the passes that a first text needs now, and not while somebody waits for it."""
        self.choose([Acceptance()], LONGEST_DRAFT)

    def remember(self, text: Acceptance) -> None:
        """Take up the acceptance of a text that is complete."""
        self.prior += 0.3 * (text.rate - self.prior)


def expected_tokens(acceptance: float, num_drafts: int) -> float:
    """Tokens that a round gives on average, the one behind the accepted drafts included."""
    return math.fsum(acceptance**power for power in range(num_drafts + 1))


def _time_pass(step: Stepper, num_tokens: int) -> float:
    """Seconds of a pass over so many tokens in one row, or in eight."""
    num_rows = 1 if num_tokens <= LONGEST_DRAFT + 1 else 8
    while num_tokens // num_rows > (max_positions(step.model) or num_tokens):
        num_rows *= 2
    ids = torch.full((num_rows, num_tokens // num_rows), any_id(step.model), dtype=torch.int64)
    step = step.twin()
    cache = step.new_cache()
    cache.add_rows(num_rows)
    timings: list[float] = []
    while len(timings) < 3:  # the first one also makes what later ones find
        _wait_for(step.device)
        begun = time.perf_counter()
        step(cache, ids, keep=0)
        _wait_for(step.device)
        timings.append(time.perf_counter() - begun)
        cache.cut([0] * num_rows)
        if len(timings) == 2 and timings[0] > _SLOW_S:
            break
    return min(timings)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # of the thread's own work: others may be recording graphs
