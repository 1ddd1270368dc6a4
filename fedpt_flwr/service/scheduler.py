"""Continuous batching: requests join and leave a running batch at every step.

One thread owns the models. It takes tasks from a bounded queue, first come first served, reads their prompts (a long
one in pieces, between the steps of the others), and then appends tokens to every text that is being written: one per
step, or more where drafting pays (``speculative.py``). Each text has its own model, strength, sampling and length. A
task is bound to the version of the proxy that was current when it came: the large model's rows of all versions go
through one forward pass, and a version is forgotten when its last task has ended.

What comes out is handed over as events, all those of a step at once. Nothing here knows HTTP.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedpt_flwr.drafting import Acceptance, DraftLength, StepCosts
from fedpt_flwr.errors import RemoteError
from fedpt_flwr.logits import choose_next, combine_logits, fill_hidden, mask_implausible
from fedpt_flwr.ragged import RaggedCache, Stepper
from fedpt_flwr.service.metrics import Metrics
from fedpt_flwr.service.text import TextStream
from fedpt_flwr.service.versions import Version
from fedpt_flwr.speculative import PARTS, draft, is_spoilt

_log = logging.getLogger(__name__)

_SCORED_AT_ONCE = 64
"""Tokens of a prompt that are scored in one pass, where their probabilities are asked for: scores are wide."""


_LOOK_EVERY = 4
"""Steps without drafts between two looks at whether drafts would be right now."""

_IMPOSSIBLE = -9999.0
"""The log-probability of a prompt's token that the mask rules out: JSON has no -inf, and this is what OpenAI writes."""


# --- what goes in -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler takes on."""

    num_slots: int = 32
    """Texts that are written at once."""
    queue_size: int = 128
    """Texts that may wait; whoever comes then is sent away."""
    prefill_tokens: int = 512
    """Tokens of prompts that are read between two steps of the texts that are being written."""
    draft_tokens: int | Literal["auto"] = "auto"
    """Tokens that the tuned model drafts for each text of the proxy in a step; ``auto``: as many as pay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a text is to be written."""

    model: str = "proxy"
    """``proxy``, ``large``, ``tuned`` or ``untuned``."""
    alpha: float = 1.0
    plausibility: float = 0.0
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    max_new_tokens: int = 16
    """0 only with ``score_prompt``."""
    stop: tuple[str, ...] = ()
    num_top: int | None = None
    """Alternatives whose log-probabilities are reported with each token's own; None: not even that."""
    details: bool = False
    """Report what the large model thinks of each token; only for the proxy."""
    score_prompt: bool = False
    """Report the log-probabilities of the prompt's tokens, too."""
    num_full: int = 0
    """Report those of all tokens after each of the prompt's last so many tokens; only with ``score_prompt``."""


@dataclass(eq=False, slots=True, kw_only=True)
class Task:
    """A prompt and the texts that are to follow it."""

    prompt_ids: Sequence[int]
    """At least one."""
    settings: Settings
    version: Version
    seeds: Sequence[int]
    """One for each text that is wanted."""
    sink: Callable[[Event], None]
    """Called with every event of this task by what the scheduler hands its events to."""
    deadline: float = float("inf")
    """``time.monotonic()`` at which the task is given up."""
    submitted: float = field(default_factory=time.monotonic)


# --- what comes out -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log-probability and those of its best rivals, in nats."""

    token_id: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Details:
    """What the proxy and the large model think of a token."""

    probability: float
    large_probability: float
    large_token_id: int
    large_token_probability: float


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log-probabilities of the prompt's tokens from the second on; the first follows nothing."""

    scores: Sequence[TokenScore]
    full: Tensor | None = None
    """Those of all tokens after each of the last tokens, ``(num_full, vocab)``, float32."""


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of a text."""

    choice: int
    token_id: int
    text: str
    """What can be shown now; may be empty, or belong to earlier tokens."""
    score: TokenScore | None
    details: Details | None


@dataclass(frozen=True, slots=True)
class End:
    """A text is complete."""

    choice: int
    reason: str
    """``stop``: by itself or at a stop string; ``length``: at ``max_new_tokens``."""
    text: str
    """What had been held back."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The task ends without a result."""

    reason: str
    """``deadline``, ``stopping``, ``remote`` or ``internal``."""
    message: str


Event = PromptScores | Token | End | Failure
Delivery = Sequence[tuple[Callable[[Event], None], Event]]


class QueueFull(Exception):
    """No more tasks can wait.

    Args:
        retry_after_s: When to come again, in seconds.
    """

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full")
        self.retry_after_s = retry_after_s


class Stopping(Exception):
    """No more tasks are taken on."""


# --- inside -------------------------------------------------------------------------------------------------------


class _Choice:
    """One text that is being written."""

    __slots__ = (
        "acceptance",
        "drafts",
        "first_at",
        "gained",
        "index",
        "last_id",
        "num_tokens",
        "rows",
        "runners",
        "seed",
        "stream",
        "task",
    )

    def __init__(self, task: Task, index: int, acceptance: float) -> None:
        self.task = task
        self.index = index
        self.seed = task.seeds[index]
        self.stream = TextStream(task.version.tokenizer, task.prompt_ids, task.settings.stop)
        self.num_tokens = 0
        self.last_id = -1
        self.first_at = 0.0
        self.acceptance = Acceptance(acceptance)
        self.drafts: list[int] = []  # of the current step
        self.gained = 0  # tokens of the current step
        self.runners: dict[str, _Runner] = {}
        self.rows: dict[str, int] = {}


class _Runner:
    """One of the models, with a row for each text that needs it."""

    def __init__(self, name: str, stepper: Stepper) -> None:
        self.name = name
        self.stepper = stepper
        self.cache = stepper.new_cache()
        self.choices: list[_Choice] = []

    def add(self, choices: Sequence[_Choice], cache: RaggedCache, row: int) -> None:
        self.cache.append(cache, row, len(choices))
        for choice in choices:
            choice.runners[self.name] = self
            choice.rows[self.name] = len(self.choices)
            self.choices.append(choice)

    def remove(self, choice: _Choice) -> None:
        row = choice.rows.pop(self.name)
        self.cache.remove(row)
        last = self.choices.pop()
        if last is not choice:
            self.choices[row] = last
            last.rows[self.name] = row

    def launch(self, num_drafts: int) -> Callable[[], Tensor]:
        """Begin a pass; waits for scores after each last token and its drafts, ``(rows, 1 + num_drafts, width)``."""
        # A row without drafts gets its own last token for them, which every model can read that has the row: what is
        # said about them is not looked at.
        ids = [[text.last_id, *text.drafts, *[text.last_id] * (num_drafts - len(text.drafts))] for text in self.choices]
        if self.stepper.is_remote:  # nor is it paid for
            num_wanted = [1 + len(text.drafts) for text in self.choices]
            scores = self.stepper(self.cache, torch.tensor(ids), keep=0, num_wanted=num_wanted)
            return lambda: scores
        return self.stepper.launch(self.cache, torch.tensor(ids), keep=0)

    def draft(self, num_drafts: int, *, is_rough: bool) -> Tensor:
        """Such scores of the tuned model, which makes the drafts one by one; see :func:`.speculative.draft`."""
        for text in self.choices:
            text.drafts = []
        last_ids = torch.tensor([[text.last_id] for text in self.choices])
        if not num_drafts:
            return self.stepper(self.cache, last_ids)

        def guess(tuned: Tensor, drafts: Tensor) -> Tensor:  # noqa: ARG001
            guesses = _guesses(self.choices, tuned)
            for text, one in zip(self.choices, guesses, strict=True):
                text.drafts.append(one)
            return torch.tensor(guesses, device=tuned.device)

        _, scores = draft(self.stepper, self.cache, last_ids, num_drafts, guess, is_rough=is_rough)
        return scores

    def take_back(self, num_new: int) -> None:
        """Forget the tokens of a step that were not accepted."""
        lengths = self.cache.lengths
        self.cache.cut([length - num_new + text.gained for length, text in zip(lengths, self.choices, strict=True)])


class _Prefill:
    """Prompts that are being read together."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.offset = 0
        self.width = max(len(task.prompt_ids) for task in tasks)
        self.scores_prompt = tasks[0].settings.score_prompt
        # With a token of the row itself, because a translated model need not read any other.
        padded = [[*ids, *[ids[-1]] * (self.width - len(ids))] for ids in (task.prompt_ids for task in tasks)]
        self.ids = torch.tensor(padded)
        self.members: dict[Stepper, list[int]] = {}
        for number, task in enumerate(tasks):
            for stepper in _steppers(task).values():
                self.members.setdefault(stepper, []).append(number)
        self.caches = {stepper: stepper.new_cache() for stepper in self.members}
        for stepper, members in self.members.items():
            self.caches[stepper].add_rows(len(members))
        self.last: dict[tuple[Stepper, int], Tensor] = {}  # scores after a task's prompt
        self.prompt_scores: list[TokenScore] = []
        self.full: list[Tensor] = []  # log-probabilities of all tokens, ``(columns, vocab)``

    @property
    def done(self) -> bool:
        return self.offset >= self.width

    def advance(self, num_tokens: int) -> dict[Stepper, Tensor]:
        """Read so many more columns; the scores of all of them where they are wanted."""
        end = min(self.width, self.offset + num_tokens)
        everything = {}
        for stepper, members in self.members.items():
            lasts = [len(self.tasks[number].prompt_ids) - 1 - self.offset for number in members]
            if stepper.is_remote and not self.scores_prompt:
                self._read_remote(stepper, members, end)
                continue
            columns = sorted({last for last in lasts if 0 <= last < end - self.offset}) or [0]
            keep = 0 if self.scores_prompt else torch.tensor(columns)
            logits = stepper(self.caches[stepper], self.ids[members, self.offset : end], keep=keep)
            everything[stepper] = logits
            for row, (number, last) in enumerate(zip(members, lasts, strict=True)):
                if 0 <= last < end - self.offset:
                    self.last[stepper, number] = logits[row, last if self.scores_prompt else columns.index(last)]
        self.offset = end
        return everything

    def _read_remote(self, stepper: Stepper, members: Sequence[int], end: int) -> None:
        """Ask about the last token of each prompt and nothing else, once all of them have been read."""
        cache = self.caches[stepper]
        stepper.read(cache, self.ids[members, self.offset : end])
        if end < self.width:
            return
        prompts = [self.tasks[number].prompt_ids for number in members]
        cache.cut([len(prompt) - 1 for prompt in prompts])
        logits = stepper(cache, torch.tensor([[prompt[-1]] for prompt in prompts]))
        self.last |= {(stepper, number): logits[row, 0] for row, number in enumerate(members)}


class Scheduler:
    """Writes the texts of many requests at once, in a thread of its own.

    Args:
        version: What new tasks are bound to at first.
        limits: What it takes on.
        metrics: Where it counts.
        deliver: Called in the scheduler's thread with the events of a step, in order.
        num_threads: CPU threads to compute with; None leaves torch's default.
    """

    def __init__(
        self,
        version: Version,
        limits: Limits,
        metrics: Metrics,
        deliver: Callable[[Delivery], None],
        *,
        num_threads: int | None = None,
    ) -> None:
        self.limits = limits
        self._version = version
        self._metrics = metrics
        self._deliver = deliver
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._queue: collections.deque[Task] = collections.deque()
        self._cancelled: set[Task] = set()
        self._stop_at: float | None = None
        # Below: only the thread's.
        self._prefill: _Prefill | None = None
        self._reading: list[Task] = []  # taken from the queue and not live yet, whatever becomes of them
        self._live: dict[Task, list[_Choice]] = {}
        self._runners: dict[Stepper, _Runner] = {}
        self._outbox: list[tuple[Callable[[Event], None], Event]] = []
        self._task_s = 1.0  # how long a task takes, a running mean
        self._num_steps = 0
        self._draft_length: tuple[Stepper, DraftLength] | None = None  # with the large model that it was made for
        self._thread = threading.Thread(target=self._run, name="fedpt-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Take on nothing more, and end the thread when all tasks have ended or the grace period has."""
        with self._changed:
            self._stop_at = time.monotonic() + grace_s
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def version(self) -> Version:
        """What new tasks should be bound to."""
        return self._version

    def swap(self, version: Version) -> None:
        """Bind the tasks to come to another version; those that are there stay with theirs."""
        with self._changed:
            self._version = version
            self._changed.notify()  # whoever has nothing to do lets the other version go
        self._metrics.set_version(version)

    def submit(self, tasks: Sequence[Task]) -> None:
        """Queue tasks, all or none.

        Args:
            tasks: Each with at most ``limits.num_slots`` texts.

        Raises:
            QueueFull: There is no room for them all.
            Stopping: The scheduler stops.
        """
        number = sum(len(task.seeds) for task in tasks)
        with self._changed:
            if self._stop_at is not None:
                raise Stopping
            waiting = sum(len(task.seeds) for task in self._queue)
            if waiting + number > self.limits.queue_size and waiting:
                raise QueueFull(max(1, min(60, round(waiting / self.limits.num_slots * self._task_s))))
            self._queue.extend(tasks)
            self._metrics.queue_length.set(waiting + number)
            self._changed.notify()

    def cancel(self, tasks: Iterable[Task]) -> None:
        """Forget tasks; their slots are free at the next step. Those that have ended are passed over."""
        with self._changed:
            self._cancelled.update(tasks)
            self._changed.notify()

    # --- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)  # OpenMP counts per thread
        with torch.inference_mode():
            if self.limits.draft_tokens == "auto":
                try:
                    self._length_of(self._version).measure()
                except Exception:  # what is not over soon fails in a step, where somebody is told
                    _log.exception("the passes could not be timed")
            while self._wait():
                try:
                    self._step()
                except Exception as error:  # a model failed: whoever used it is told, the next request works
                    _log.exception("a decoding step failed")
                    self._fail_all("internal", f"a decoding step failed ({type(error).__name__})")
                self._hand_over()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False when there never will be."""
        with self._changed:
            while not (self._queue or self._live or self._prefill or self._cancelled):
                if self._stop_at is not None:
                    return False
                self._let_go()
                self._changed.wait()
            overdue = self._stop_at is not None and time.monotonic() >= self._stop_at
        if overdue:
            self._fail_all("stopping", "the service is stopping")
            with self._changed:
                waiting = list(self._queue)
                self._queue.clear()
            for task in waiting:
                self._fail(task, "stopping", "the service is stopping")
            self._hand_over()
            return False
        return True

    def _step(self) -> None:
        self._drop_gone()
        if self._prefill is None:
            self._begin_prefill()
        if self._prefill is not None:
            try:
                self._advance_prefill(self._prefill)
            except RemoteError as error:  # a prompt's fault perhaps: the texts that are being written go on
                self._fail_remote(self._reading, error)
                self._prefill, self._reading = None, []
        if self._live:
            self._decode()
        self._metrics.slots_in_use.set(sum(map(len, self._live.values())))

    def _drop_gone(self) -> None:
        """Forget the tasks that were cancelled or have passed their deadline."""
        now = time.monotonic()
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
            late = [task for task in self._queue if task.deadline <= now and task not in cancelled]
            if late or cancelled:
                gone = cancelled.union(late)
                self._queue = collections.deque(task for task in self._queue if task not in gone)
                self._metrics.queue_length.set(sum(len(task.seeds) for task in self._queue))
        active = [*self._live, *(self._prefill.tasks if self._prefill else ())]
        late += [task for task in active if task.deadline <= now and task not in cancelled]
        for task in late:
            self._fail(task, "deadline", "the request was not done within the time that one may take")
        gone = cancelled.union(late)
        for task in gone.intersection(self._live):
            self._release(self._live.pop(task))
        if self._prefill is not None and gone.intersection(self._prefill.tasks):
            # The others of the group begin again: so soon that keeping their part is not worth the trouble.
            with self._changed:
                self._queue.extendleft(task for task in reversed(self._prefill.tasks) if task not in gone)
            self._prefill = None

    def _begin_prefill(self) -> None:
        """Take tasks from the head of the queue, as many as there are slots and as can be read in one pass."""
        free = self.limits.num_slots - sum(map(len, self._live.values()))
        tasks: list[Task] = []
        width = 0
        with self._changed:
            while self._queue:
                task = self._queue[0]
                width = max(width, len(task.prompt_ids))
                alone = task.settings.score_prompt or (len(tasks) + 1) * width > self.limits.prefill_tokens
                if len(task.seeds) > free or (tasks and (alone or tasks[0].settings.score_prompt)):
                    break
                if tasks and _needs_remote(task) != _needs_remote(tasks[0]):  # that may fail, and by itself
                    break
                tasks.append(self._queue.popleft())
                free -= len(task.seeds)
            self._reading = tasks
            self._metrics.queue_length.set(sum(len(task.seeds) for task in self._queue))
        if tasks:
            self._prefill = _Prefill(tasks)

    def _advance_prefill(self, prefill: _Prefill) -> None:
        if prefill.scores_prompt:
            task, start = prefill.tasks[0], prefill.offset
            logits = prefill.advance(_SCORED_AT_ONCE)
            self._score_prompt(prefill, task, start, logits)
        else:
            prefill.advance(self.limits.prefill_tokens)
        if not prefill.done:
            return
        self._prefill = None
        prior = self._length_of(prefill.tasks[0].version).prior
        choices = {task: [_Choice(task, index, prior) for index in range(len(task.seeds))] for task in prefill.tasks}
        for task, texts in choices.items():
            if prefill.scores_prompt:
                full = torch.cat(prefill.full)[-task.settings.num_full :] if task.settings.num_full else None
                self._emit(task, PromptScores(prefill.prompt_scores, full))
            if task.settings.max_new_tokens:
                self._live[task] = texts
            else:
                for text in texts:
                    self._end(text, "length")
        for stepper, members in prefill.members.items():
            cache = prefill.caches[stepper]
            cache.cut([len(prefill.tasks[number].prompt_ids) for number in members])
            for row, number in enumerate(members):
                task = prefill.tasks[number]
                if task in self._live:
                    self._runner(task, stepper).add(choices[task], cache, row)
        self._reading = []
        first = [text for task, texts in choices.items() if task in self._live for text in texts]
        numbers = {task: number for number, task in enumerate(prefill.tasks)}

        def after_prompt(name: str, texts: Sequence[_Choice]) -> Tensor:
            steppers = (text.task.version.steppers[name] for text in texts)
            return torch.stack(
                [prefill.last[stepper, numbers[text.task]] for stepper, text in zip(steppers, texts, strict=True)]
            )[:, None]

        self._finish(self._write(first, after_prompt))

    def _score_prompt(self, prefill: _Prefill, task: Task, start: int, logits: dict[Stepper, Tensor]) -> None:
        """Log-probabilities of the tokens that follow those just read."""
        by_name = {name: logits[stepper][0] for name, stepper in _steppers(task).items()}
        logprobs = _scores([task.settings], task.version, by_name).log_softmax(-1)
        if (first := len(task.prompt_ids) - task.settings.num_full - start) < len(logprobs):
            prefill.full.append(logprobs[max(0, first) :, : task.version.vocab_size].cpu())
        if task.settings.num_top is None:
            return
        following = list(task.prompt_ids[start + 1 : start + 1 + len(logprobs)])
        prefill.prompt_scores += _token_scores(logprobs[: len(following)], following, task.settings.num_top or 0)

    def _runner(self, task: Task, stepper: Stepper) -> _Runner:
        if stepper not in self._runners:
            name = next(name for name, other in task.version.steppers.items() if other is stepper)
            self._runners[stepper] = _Runner(name, stepper)
        return self._runners[stepper]

    def _decode(self) -> None:
        """Append a token to every text, or several."""
        texts = [text for texts in self._live.values() for text in texts]
        num_drafts, chosen_by = self._num_drafts(texts)
        runners = list(self._runners.values())
        lengths = [list(runner.cache.lengths) for runner in runners]
        try:
            begun = time.perf_counter()
            scored = self._ask(runners, num_drafts)
            if chosen_by is not None and all(len(runner.choices) == len(texts) for runner in runners):
                chosen_by.costs.observe(len(texts), num_drafts, time.perf_counter() - begun)
            if num_drafts and is_spoilt(*scored.values()):
                for runner, before in zip(runners, lengths, strict=True):
                    runner.cache.cut(before, clear=True)
                num_drafts, scored = 0, self._ask(runners, 0)
        except RemoteError as error:
            for runner, before in zip(runners, lengths, strict=True):
                runner.cache.cut(before)
            for text in texts:
                text.drafts = []
            lost = [task for task in self._live if _needs_remote(task)]
            self._fail_remote(lost, error)
            for task in lost:
                self._release(self._live.pop(task))
            return
        self._num_steps += 1
        if not num_drafts and self._num_steps % _LOOK_EVERY == 0 and self.limits.draft_tokens == "auto":
            for runner, scores in scored.items():  # what it would have drafted costs nothing to know
                if runner.name == "tuned":
                    for text, guess in zip(runner.choices, _guesses(runner.choices, scores[:, 0]), strict=True):
                        text.drafts.append(guess)

        def after_last(name: str, group: Sequence[_Choice]) -> Tensor:
            logits = scored[group[0].runners[name]]
            rows = [text.rows[name] for text in group]
            return logits if rows == list(range(len(logits))) else logits[torch.tensor(rows, device=logits.device)]

        ended = self._write(texts, after_last)
        if num_drafts:
            for runner in scored:
                runner.take_back(1 + num_drafts)
        self._finish(ended)

    def _ask(self, runners: Sequence[_Runner], num_drafts: int) -> dict[_Runner, Tensor]:
        """Scores of every model; the judges wait for drafts, if there are to be any."""
        judges = [runner for runner in runners if runner.name != "tuned"]
        begun = {} if num_drafts else {runner: runner.launch(0) for runner in judges}
        scored = {}
        for runner in (runner for runner in runners if runner.name == "tuned"):
            costs = self._length_of(runner.choices[0].task.version).costs
            is_rough = costs.drafts_roughly(len(runner.choices), num_drafts)
            scored[runner] = runner.draft(num_drafts, is_rough=is_rough)
        begun = begun or {runner: runner.launch(num_drafts) for runner in judges}
        return scored | {runner: wait() for runner, wait in begun.items()}

    def _num_drafts(self, texts: Sequence[_Choice]) -> tuple[int, DraftLength | None]:
        """Tokens to draft in this step, and what has chosen that: more than one text can get are of no use."""
        drafting = [text for text in texts if text.task.settings.model == "proxy"]
        longest = max((text.task.settings.max_new_tokens - text.num_tokens for text in drafting), default=0) - 1
        for text in texts:  # those without drafts, too, take part in a pass of so many tokens
            if (context := text.task.version.context) is not None:
                # No text fills the context: a remote model is asked for one token more, which must have room.
                longest = min(longest, context - 1 - len(text.task.prompt_ids) - text.num_tokens)
        if longest < 1:
            return 0, None
        if self.limits.draft_tokens != "auto":
            return min(self.limits.draft_tokens, longest), None
        length = self._length_of(drafting[0].task.version)
        return length.choose([text.acceptance for text in drafting], longest), length

    def _length_of(self, version: Version) -> DraftLength:
        """What chooses draft lengths; what passes cost is the same for all versions with one large model."""
        if self._draft_length is None or self._draft_length[0] is not version.steppers["large"]:
            self._draft_length = version.steppers["large"], DraftLength(StepCosts(version.steppers))
        length = self._draft_length[1]
        if version is self._version:
            length.costs.steps = version.steppers  # those of a version before would keep it in memory
        return length

    def _let_go(self) -> None:
        """Keep nothing of a version that new tasks do not get, now that none has one."""
        if self._draft_length is None:
            return
        large, length = self._draft_length
        if large is self._version.steppers["large"]:
            length.costs.steps = self._version.steppers
        else:
            self._draft_length = None

    def _write(
        self,
        texts: Sequence[_Choice],
        logits_of: Callable[[str, Sequence[_Choice]], Tensor],
    ) -> list[_Choice]:
        """Choose the next tokens of texts whose models have been asked.

        Args:
            texts: The texts.
            logits_of: Scores ``(texts, 1 + drafts, width)`` of a model, by name, for texts of one version.

        Returns:
            The texts that are complete.
        """
        # By the version itself and not its name: one that is loaded again has the name, but not the rows.
        groups: dict[tuple[Version, str], list[_Choice]] = {}
        for text in texts:
            groups.setdefault((text.task.version, text.task.settings.model), []).append(text)
        ended = []
        for group in groups.values():
            names = PARTS if group[0].task.settings.model == "proxy" else (group[0].task.settings.model,)
            ended += self._write_group(group, {name: logits_of(name, group) for name in names})
        return ended

    def _finish(self, ended: Sequence[_Choice]) -> None:
        """Let texts go that are complete; rows of the caches change their numbers."""
        self._release(ended)
        for text in ended:
            others = self._live[text.task]
            others.remove(text)
            if not others:
                del self._live[text.task]

    def _write_group(self, group: Sequence[_Choice], logits: dict[str, Tensor]) -> list[_Choice]:
        """Choose tokens for texts of one version and model; those that are complete with them."""
        settings = [text.task.settings for text in group]
        version = group[0].task.version
        if group[0].task.settings.model != "proxy" and not any(text.drafts for text in group):
            logits = {name: scores[:, :1] for name, scores in logits.items()}
        scores = _scores(settings, version, logits)
        num_places = scores.shape[1]
        each = [setting for setting in settings for _ in range(num_places)]
        ids = choose_next(
            scores.flatten(0, 1),
            temperature=[setting.temperature for setting in each],
            top_p=[setting.top_p for setting in each],
            seeds=[text.seed for text in group for _ in range(num_places)],
            positions=[text.num_tokens + place for text in group for place in range(num_places)],
        )
        chosen = ids.view(-1, num_places).tolist()
        right = [_num_right(text.drafts, row) for text, row in zip(group, chosen, strict=True)]
        new = [row[: 1 + number] for row, number in zip(chosen, right, strict=True)]
        reports = self._reports(group, new, scores, logits)
        now = time.monotonic()
        ended = []
        for text, token_ids, num_right in zip(group, new, right, strict=True):
            if text.drafts:
                self._judge(text, num_right, is_look=num_places == 1)
            text.drafts, text.gained = [], 0
            for token_id in token_ids:
                score, detail = next(reports[text]) if text in reports else (None, None)
                text.gained += 1
                if self._add_token(text, token_id, score, detail, now):
                    ended.append(text)
                    break
        return ended

    def _judge(self, text: _Choice, num_right: int, *, is_look: bool) -> None:
        """Take up how many of a text's drafts were right; a look drafts nothing and only says what would have been."""
        if text.task.settings.model != "proxy":
            return
        text.acceptance.observe(num_right, len(text.drafts))
        if not is_look:
            self._metrics.drafted_tokens.inc(len(text.drafts))
            self._metrics.accepted_tokens.inc(num_right)

    def _reports(
        self, group: Sequence[_Choice], new: Sequence[Sequence[int]], scores: Tensor, logits: dict[str, Tensor]
    ) -> dict[_Choice, Iterator[tuple[TokenScore | None, Details | None]]]:
        """What is to be said about the new tokens of texts that ask for it.

        Args:
            group: Texts of one version and model.
            new: The new tokens of each.
            scores: What they were chosen from, ``(texts, places, width)``.
            logits: ``(texts, places, width)`` of each model, by name.
        """
        wanted = [
            row
            for row, text in enumerate(group)
            if text.task.settings.num_top is not None or text.task.settings.details
        ]
        if not wanted:
            return {}
        rows = torch.tensor([row for row in wanted for _ in new[row]], device=scores.device)
        places = torch.tensor([place for row in wanted for place in range(len(new[row]))], device=scores.device)
        chosen = [token_id for row in wanted for token_id in new[row]]
        logprobs = scores[rows, places].log_softmax(-1)
        asked = [group[row].task.settings for row in wanted]
        needs_large = any(settings.details for settings in asked)
        device = logits["large"].device if needs_large else rows.device
        large = logits["large"][rows.to(device), places.to(device)] if needs_large else None
        token_scores = _token_scores(logprobs, chosen, max(settings.num_top or 0 for settings in asked))
        details = _details(logprobs, large, chosen, group[0].task.version.vocab_size)
        pairs = iter(zip(token_scores, details, strict=True))
        return {group[row]: iter([next(pairs) for _ in new[row]]) for row in wanted}

    def _add_token(
        self, text: _Choice, token_id: int, score: TokenScore | None, details: Details | None, now: float
    ) -> bool:
        """Put a token at a text's end; whether the text is complete."""
        task, settings = text.task, text.task.settings
        text.last_id = token_id
        text.num_tokens += 1
        if text.num_tokens == 1:
            text.first_at = now
            self._metrics.time_to_first_token.observe(now - task.submitted)
        shown = text.stream.push(token_id)
        if score is not None:
            score = (
                None if settings.num_top is None else TokenScore(token_id, score.logprob, score.top[: settings.num_top])
            )
        self._emit(task, Token(text.index, token_id, shown, score, details if settings.details else None))
        if token_id in task.version.end_ids or text.stream.stopped:
            self._end(text, "stop")
        elif text.num_tokens >= settings.max_new_tokens:
            self._end(text, "length")
        else:
            return False
        return True

    def _end(self, text: _Choice, reason: str) -> None:
        now, task = time.monotonic(), text.task
        if task.settings.model == "proxy":  # nobody drafts for the others, so theirs is what it was assumed to be
            self._length_of(task.version).remember(text.acceptance)
        self._emit(task, End(text.index, reason, text.stream.finish()))
        self._metrics.generated_tokens.labels(task.settings.model).inc(text.num_tokens)
        if text.num_tokens > 1:
            self._metrics.time_per_token.observe((now - text.first_at) / (text.num_tokens - 1))
        self._task_s += 0.1 * (now - task.submitted - self._task_s)

    def _release(self, texts: Iterable[_Choice]) -> None:
        """Free the rows of texts."""
        for text in texts:
            for runner in text.runners.values():
                runner.remove(text)
                if not runner.choices:
                    self._runners.pop(runner.stepper, None)  # and with it perhaps the last trace of a version
            text.runners = {}

    def _fail(self, task: Task, reason: str, message: str) -> None:
        self._emit(task, Failure(reason, message))

    def _fail_remote(self, tasks: Iterable[Task], error: RemoteError) -> None:
        _log.warning("the remote large model: %s", error)
        for task in tasks:
            self._fail(task, "remote", str(error))

    def _fail_all(self, reason: str, message: str) -> None:
        """Give up everything but the queue."""
        for task in dict.fromkeys([*self._live, *self._reading]):
            self._fail(task, reason, message)
        self._prefill = None
        self._reading = []
        self._live = {}
        self._runners = {}

    def _emit(self, task: Task, event: Event) -> None:
        self._outbox.append((task.sink, event))

    def _hand_over(self) -> None:
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            self._deliver(outbox)


def _steppers(task: Task) -> dict[str, Stepper]:
    """The models that a task needs, by name."""
    names = PARTS if task.settings.model == "proxy" else (task.settings.model,)
    return {name: task.version.steppers[name] for name in names}


def _needs_remote(task: Task) -> bool:
    """Whether a task needs a model behind an API."""
    return any(stepper.is_remote for stepper in _steppers(task).values())


def _scores(settings: Sequence[Settings], version: Version, logits: dict[str, Tensor]) -> Tensor:
    """What tokens are chosen from, ``(texts, …, width)``, float32.

    Args:
        settings: Of each text; or of one, for all rows.
        version: Of them all.
        logits: ``(texts, …, width)`` of each model, by name.
    """
    if settings[0].model != "proxy":
        scores = logits[settings[0].model].to(torch.float32, copy=True)
        scores[..., version.vocab_size :] = -torch.inf
        return scores
    large = logits["large"]
    if version.proxy.hides_tokens:
        fills = torch.tensor([version.proxy.large.fills(samples=setting.temperature > 0) for setting in settings])
        filled = fill_hidden(large, logits["untuned"], vocab_size=version.vocab_size)
        # One settings for all rows, or one for each.
        large = torch.where(fills.view(-1, *[1] * (large.dim() - 1)).to(large.device), filled, large)
    return combine_logits(
        large,
        logits["tuned"],
        logits["untuned"],
        alpha=_one_or_each([setting.alpha for setting in settings]),
        plausibility=_one_or_each([setting.plausibility for setting in settings]),
        vocab_size=version.vocab_size,
    )


def _guesses(texts: Sequence[_Choice], logits: Tensor) -> list[int]:
    """What the tuned model would write by itself behind its drafts: its texts' tokens, or guesses at the proxy's.

    Args:
        texts: Of one tuned model.
        logits: Its scores ``(texts, width)``.
    """
    settings = [text.task.settings for text in texts]
    version = texts[0].task.version
    scores = logits.to(torch.float32, copy=True)
    scores[:, version.vocab_size :] = -torch.inf
    if version.missing is not None:  # the large model reads what is drafted, and never chooses these
        scores[:, version.missing.to(scores.device)] = -torch.inf
    mask_implausible(
        scores,
        scores,
        plausibility=_one_or_each([setting.plausibility * (setting.model == "proxy") for setting in settings]),
        vocab_size=version.vocab_size,
    )
    ids: list[int] = choose_next(
        scores,
        temperature=[setting.temperature for setting in settings],
        top_p=[setting.top_p for setting in settings],
        seeds=[text.seed for text in texts],
        positions=[text.num_tokens + len(text.drafts) for text in texts],
    ).tolist()
    return ids


def _num_right(drafts: Sequence[int], chosen: Sequence[int]) -> int:
    """How many drafts are what was chosen, before the first that is not."""
    pairs = list(zip(drafts, chosen, strict=False))
    return next((place for place, (draft, choice) in enumerate(pairs) if draft != choice), len(pairs))


def _one_or_each(values: Sequence[float]) -> float | Tensor:
    return values[0] if len(set(values)) == 1 else torch.tensor(values)


def _token_scores(logprobs: Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenScore]:
    """Reports on tokens; ids that cannot be chosen are no alternatives.

    Args:
        logprobs: ``(tokens, vocab)``, float32.
        token_ids: The tokens.
        num_top: How many alternatives, the token itself among them if it is one of the best.
    """
    if not token_ids:
        return []
    index = torch.tensor(token_ids, device=logprobs.device)[:, None]
    own = logprobs.gather(1, index)[:, 0].clamp_min(_IMPOSSIBLE).tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.shape[1]), dim=1)
    tops: list[Any] = [
        [(int(token_id), value) for token_id, value in zip(row_ids, row, strict=True) if value > -torch.inf]
        for row_ids, row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    return [TokenScore(token_id, value, top) for token_id, value, top in zip(token_ids, own, tops, strict=True)]


def _details(
    logprobs: Tensor, large: Tensor | None, token_ids: Sequence[int], vocab_size: int
) -> Sequence[Details | None]:
    """What proxy and large model think of tokens; nothing without the large model's scores ``(tokens, width)``."""
    if large is None:
        return [None] * len(token_ids)
    of_large = large[:, :vocab_size].float().log_softmax(-1)
    index = torch.tensor(token_ids, device=large.device)[:, None]
    best, best_ids = of_large.max(-1)
    columns = (
        logprobs.gather(1, index.to(logprobs.device))[:, 0].exp().tolist(),
        of_large.gather(1, index)[:, 0].exp().tolist(),
        best_ids.tolist(),
        best.exp().tolist(),
    )
    return [Details(*row) for row in zip(*columns, strict=True)]
