"""The scheduler by itself, on tiny models: every text is what ``ProxyModel.generate`` writes, whoever else is there."""

import gc
import threading
import time
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_speculative import relatives
from tiny import EOS, VOCAB, tiny_gpt2, tiny_llama, tiny_tokenizer

from fedpt_flwr.lean import LeanStepper
from fedpt_flwr.prompts import Template
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.ragged import Stepper
from fedpt_flwr.service.metrics import Metrics
from fedpt_flwr.service.scheduler import (
    End,
    Failure,
    Limits,
    PromptScores,
    QueueFull,
    Scheduler,
    Settings,
    Stopping,
    Task,
    Token,
)
from fedpt_flwr.service.versions import Version
from fedpt_flwr.vocabulary import IdMap, translate


def make_proxy(kind="llama", tuned_seed=2):
    if kind == "lora":
        base = tiny_llama(3)
        tuned = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=4)).eval()
        generator = torch.Generator().manual_seed(tuned_seed)
        with torch.no_grad():
            for name, weight in tuned.named_parameters():
                if "lora_" in name:
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
        return ProxyModel(tiny_llama(1), tuned, None, vocab_size=VOCAB)
    if kind == "related":  # drafts are right now and then
        return ProxyModel(*relatives(), vocab_size=VOCAB)
    small = tiny_gpt2 if kind == "mixed" else tiny_llama
    # The large model's vocabulary is padded, as real ones are.
    return ProxyModel(tiny_llama(1, vocab=VOCAB + 5), small(tuned_seed), small(3), vocab_size=VOCAB)


def make_version(proxy, name="v1", steppers=None, end_ids=frozenset({EOS})):
    return Version(
        name=name,
        run="run",
        server_round=1,
        proxy=proxy,
        tokenizer=tiny_tokenizer(),
        steppers=steppers or proxy.steppers(),
        end_ids=end_ids,
        max_new_tokens=16,
        template=Template("{text}"),
        examples=[],
    )


class Inbox:
    """What one task's sink gets."""

    def __init__(self):
        self.events = []
        self._changed = threading.Condition()

    def __call__(self, event):
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()

    def wait(self, condition, timeout_s=60):
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.events), timeout_s), self.events

    def ended(self, number):
        def over(events):
            assert not (failures := [event for event in events if isinstance(event, Failure)]), failures
            return sum(isinstance(event, End) for event in events) == number

        self.wait(over)
        return self

    def ids(self, choice=0):
        return [event.token_id for event in self.events if isinstance(event, Token) and event.choice == choice]

    def text(self, choice=0):
        return "".join(event.text for event in self.events if isinstance(event, Token | End) and event.choice == choice)

    def reason(self, choice=0):
        return next(event.reason for event in self.events if isinstance(event, End) and event.choice == choice)


def deliver(events):
    for sink, event in events:
        sink(event)


@pytest.fixture
def start():
    """A function that starts a scheduler; all are ended after the test."""
    started = []

    def begin(version, **limits):
        # Some drafts always, whatever passes cost on this machine; none where the test counts the large model's passes.
        limits = {"draft_tokens": 0 if isinstance(version.steppers["large"], Gate) else 2} | limits
        scheduler = Scheduler(version, Limits(**limits), Metrics(), deliver, num_threads=1)
        scheduler.start()
        started.append(scheduler)
        return scheduler

    yield begin
    for scheduler in started:
        scheduler.stop(0)
        assert scheduler.join(30)


def random_prompt(length, seed):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def task(version, prompt, *, seeds=(0,), deadline=float("inf"), **settings):
    return Task(
        prompt_ids=prompt,
        settings=Settings(**{"alpha": 1.0, "max_new_tokens": 12, **settings}),
        version=version,
        seeds=seeds,
        sink=Inbox(),
        deadline=deadline,
    )


def expected_ids(proxy, prompt, seed=0, **settings):
    """What ``generate`` writes after one prompt, by itself."""
    settings = Settings(**{"max_new_tokens": 12, **settings})
    models = {"proxy": proxy, "large": proxy.large, "tuned": proxy.tuned, "untuned": proxy.untuned}
    if settings.model != "proxy" and settings.temperature > 0:
        # The three others know no seeds; the proxy of a model with itself is that model.
        alone = models[settings.model]
        shifted = ProxyModel(alone, tiny_llama(2), tiny_llama(2), alpha=0.0, vocab_size=VOCAB)
        return expected_ids(shifted, prompt, seed, temperature=settings.temperature, top_p=settings.top_p)
    arguments = {"do_sample": False}
    if settings.temperature > 0:
        arguments = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        arguments["seed"] = seed
    if settings.model == "proxy":
        arguments |= {"alpha": settings.alpha, "plausibility": settings.plausibility}
    model = models[settings.model]
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=EOS,
        pad_token_id=0,
        suppress_tokens=list(range(VOCAB, VOCAB + 5)) if settings.model == "large" else None,
        **arguments,
    )
    return output[0, len(prompt) :].tolist()


MIX = [
    {},
    {"alpha": 0.5},
    {"alpha": -0.7, "plausibility": 0.2},
    {"plausibility": 0.3},
    {"model": "large"},
    {"model": "tuned"},
    {"model": "untuned"},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "alpha": 2.0, "plausibility": 0.05},
    {"model": "large", "temperature": 1.0},
    {"max_new_tokens": 1},
    {"max_new_tokens": 30},
]


@pytest.mark.parametrize(
    ("kind", "draft_tokens"),
    [
        pytest.param("llama", 0, marks=pytest.mark.slow),
        ("mixed", 2),
        pytest.param("related", 4, marks=pytest.mark.slow),
        ("related", "auto"),
    ],
)
def test_texts_of_all_kinds_at_once_are_what_generate_writes(start, kind, draft_tokens):
    proxy = make_proxy(kind)
    version = make_version(proxy)
    scheduler = start(version, num_slots=7, prefill_tokens=16, draft_tokens=draft_tokens)
    tasks, expected = [], []
    for number in range(39):
        settings = MIX[number % len(MIX)]
        prompt = random_prompt(1 + (number * 7) % 31, number)
        tasks.append(task(version, prompt, seeds=(number,), **settings))
        expected.append(expected_ids(proxy, prompt, number, **settings))
    for some in (tasks[:1], tasks[1:20], tasks[20:]):
        scheduler.submit(some)
        time.sleep(0.02)
    for one, ids in zip(tasks, expected, strict=True):
        assert one.sink.ended(1).ids() == ids
        assert one.sink.reason() == ("stop" if ids[-1] == EOS else "length")
    assert len({tuple(ids) for ids in expected}) > 30  # else the texts would say little
    if kind == "related" and draft_tokens != "auto":
        drafted, accepted = (
            counter._value.get() for counter in (scheduler._metrics.drafted_tokens, scheduler._metrics.accepted_tokens)
        )
        assert 0.1 < accepted / drafted < 0.95


def test_drafts_beside_texts_at_the_end_of_a_context_change_nothing(start):
    proxy = ProxyModel(*relatives(tiny_gpt2), vocab_size=VOCAB)  # 64 learned positions
    version = make_version(proxy, end_ids=frozenset())
    prompts = [random_prompt(length, length) for length in (60, 3, 50)]
    settings = [{"max_new_tokens": 4}, {"max_new_tokens": 40}, {"max_new_tokens": 14, "model": "large"}]
    tasks = [task(version, prompt, **setting) for prompt, setting in zip(prompts, settings, strict=True)]
    start(version, draft_tokens=7).submit(tasks)
    for one, setting in zip(tasks, settings, strict=True):
        assert len(one.sink.ended(1).ids()) == setting["max_new_tokens"]
    ids = torch.tensor([prompts[1]])
    alone = proxy.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tasks[1].sink.ids() == alone[0, 3:].tolist()


def test_drafts_that_another_model_guessed_change_nothing(start, monkeypatch):
    proxy = make_proxy("related")
    version = make_version(proxy, end_ids=frozenset())
    prompts = [random_prompt(length, length) for length in (3, 9, 14)]
    settings = [{}, {"temperature": 0.8}, {"model": "tuned"}]

    def written():
        tasks = [task(version, prompt, **setting) for prompt, setting in zip(prompts, settings, strict=True)]
        start(version, draft_tokens=3).submit(tasks)
        return [one.sink.ended(1).ids() for one in tasks]

    expected = written()
    asked = []

    class Other(Stepper):
        def __call__(self, cache, ids, **settings):
            asked.append(ids.shape)
            return super().__call__(cache, ids, **settings)

    monkeypatch.setattr(LeanStepper, "rough", property(lambda _: Other(tiny_llama(7))))
    monkeypatch.setattr("fedpt_flwr.drafting.StepCosts.drafts_roughly", lambda _self, _rows, drafts: drafts > 0)
    assert written() == expected
    assert (3, 1) in asked


@pytest.mark.parametrize(
    ("draft_tokens", "others", "expected"),
    [("auto", 1, 2), ("auto", 0, 1), (3, 1, 0)],
    ids=["two texts", "one text", "of a given length"],
)
def test_what_rounds_of_texts_that_all_draft_took_is_taken_up(start, monkeypatch, draft_tokens, others, expected):
    seen = []
    monkeypatch.setattr("fedpt_flwr.drafting.StepCosts.observe", lambda _self, *given: seen.append(given))
    version = make_version(make_proxy("related"), end_ids=frozenset())
    tasks = [task(version, random_prompt(5, number), max_new_tokens=12) for number in range(1 + others)]
    scheduler = start(version, draft_tokens=draft_tokens)
    scheduler.submit(tasks)
    for one in tasks:
        one.sink.ended(1)
    assert max((num_rows for num_rows, _, _ in seen), default=0) == expected
    assert all(seconds > 0 for _, _, seconds in seen)
    before = len(seen)
    lengths = {"proxy": 12, "large": 20}  # which gets one token a round, so that the proxy's never goes on alone
    mixed = [task(version, random_prompt(5, 1), model=model, max_new_tokens=new) for model, new in lengths.items()]
    scheduler.submit(mixed)
    for one in mixed:
        one.sink.ended(1)
    assert len(seen) == before


@pytest.fixture
def never_drafting(monkeypatch):
    """Drafting never pays, so that the scheduler only looks whether it would."""
    monkeypatch.setattr("fedpt_flwr.drafting.DraftLength.choose", lambda *_: 0)


@pytest.mark.parametrize(("tuned_seed", "rises"), [(1, True), (9, False)], ids=["right", "wrong"])
def test_a_look_at_whether_drafts_would_be_right_says_so(start, never_drafting, tuned_seed, rises):
    tuned = tiny_llama(tuned_seed)
    proxy = ProxyModel(tiny_llama(1), tuned, tuned, vocab_size=VOCAB)  # the large model, whatever tuned is
    version = make_version(proxy, end_ids=frozenset())
    scheduler = start(version, draft_tokens="auto")
    before = scheduler._length_of(version).prior
    for number in range(4):
        text = task(version, random_prompt(5, number), max_new_tokens=24)
        scheduler.submit([text])
        text.sink.ended(1)
    after = scheduler._length_of(version).prior
    assert after > before + 0.1 if rises else after < before - 0.1
    assert scheduler._metrics.drafted_tokens._value.get() == 0


@pytest.mark.parametrize("model", ["large", "tuned", "untuned"])
def test_texts_for_which_nobody_drafts_say_nothing_about_drafts(start, never_drafting, model):
    version = make_version(make_proxy(), end_ids=frozenset())
    scheduler = start(version, draft_tokens="auto")
    text = task(version, random_prompt(5, 1), model=model, max_new_tokens=9)
    inbox = text.sink

    def sink(event):  # in the scheduler's thread
        if len(inbox.ids()) == 2:
            scheduler._length_of(version).prior = 0.2  # what others have learnt meanwhile
        inbox(event)

    text.sink = sink
    scheduler.submit([text])
    inbox.ended(1)
    assert scheduler._length_of(version).prior == 0.2


@pytest.mark.parametrize("missing", [0, VOCAB - 1])
@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_no_token_that_the_large_model_lacks_is_drafted_or_filled_in(start, missing, draft_tokens):
    proxy, ids = make_proxy(), torch.arange(VOCAB)
    translate(proxy.large, IdMap(torch.where(ids == missing, -1, ids)))
    for small in (proxy.tuned, proxy.untuned):  # both love that token, so that the shift is small
        small.lm_head.register_forward_hook(lambda _head, _inputs, scores: scores + 50.0 * (ids == missing))
    version = make_version(proxy, end_ids=frozenset())
    scheduler = start(version, draft_tokens=draft_tokens)
    # Read in one pass, so that the shorter prompts are padded; the large model's own text has no drafts.
    tasks = [task(version, [5, 6, 7, 8][:number], model=name) for number in (2, 4) for name in ("proxy", "large")]
    scheduler.submit(tasks)
    for one in tasks:
        assert len(one.sink.ended(1).ids()) == 12
        assert missing not in one.sink.ids()


def test_an_adapter_serves_as_tuned_and_untuned(start):
    proxy = make_proxy("lora")
    version = make_version(proxy)
    prompts = [random_prompt(length, length) for length in (3, 9, 14)]
    tasks = [task(version, prompt, model=model) for prompt in prompts for model in ("proxy", "tuned", "untuned")]
    start(version).submit(tasks)
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            assert tasks[3 * number].sink.ended(1).ids() == expected_ids(proxy, prompt)
            assert tasks[3 * number + 1].sink.ended(1).ids() == expected_ids(proxy, prompt, model="tuned")
            tasks[3 * number + 2].sink.ended(1)
    untuned = ProxyModel(proxy.large, tiny_llama(2), tiny_llama(3), vocab_size=VOCAB)
    for number, prompt in enumerate(prompts):
        assert tasks[3 * number + 2].sink.ids() == expected_ids(untuned, prompt, model="untuned")


def test_several_texts_of_one_prompt_have_seeds_of_their_own(start):
    proxy = make_proxy()
    version = make_version(proxy)
    prompt = random_prompt(8, 1)
    several = task(version, prompt, seeds=(5, 6, 7), temperature=1.0)
    start(version).submit([several])
    several.sink.ended(3)
    for choice, seed in enumerate((5, 6, 7)):
        assert several.sink.ids(choice) == expected_ids(proxy, prompt, seed, temperature=1.0)


@pytest.mark.parametrize("prefill_tokens", [1, 5, 512])
def test_a_long_prompt_read_in_pieces_gives_the_same_text(start, prefill_tokens):
    proxy = make_proxy()
    version = make_version(proxy)
    prompt = random_prompt(40, 3)
    one = task(version, prompt)
    start(version, prefill_tokens=prefill_tokens).submit([one])
    assert one.sink.ended(1).ids() == expected_ids(proxy, prompt)


def test_scores_are_log_probabilities_of_the_proxy(start):
    proxy = make_proxy()
    version = make_version(proxy)
    prompt = random_prompt(9, 4)
    settings = {"alpha": 0.6, "plausibility": 0.1, "num_top": 3}
    scored = task(version, prompt, **settings, score_prompt=True, details=True)
    start(version, prefill_tokens=4).submit([scored])
    ids = scored.sink.ended(1).ids()
    whole = torch.tensor([prompt + ids])
    with torch.no_grad():
        logprobs = proxy(whole, alpha=0.6, plausibility=0.1).logits[0].log_softmax(-1)
        large = proxy.large(whole).logits[0, :, :VOCAB].softmax(-1)

    def close(score, place):
        assert score.token_id == whole[0, place + 1]
        wanted = logprobs[place, score.token_id].clamp_min(-9999)  # the mask rules tokens of a prompt out
        assert score.logprob == pytest.approx(wanted.item(), abs=1e-4)
        values, best = logprobs[place].topk(3)
        finite = values > -torch.inf
        assert [token_id for token_id, _ in score.top] == best[finite].tolist()
        assert [value for _, value in score.top] == pytest.approx(values[finite].tolist(), abs=1e-4)

    (of_prompt,) = [event.scores for event in scored.sink.events if isinstance(event, PromptScores)]
    assert len(of_prompt) == len(prompt) - 1
    for place, score in enumerate(of_prompt):
        close(score, place)
    assert any(score.logprob == -9999 for score in of_prompt)
    tokens = [event for event in scored.sink.events if isinstance(event, Token)]
    for place, token in enumerate(tokens, start=len(prompt) - 1):
        close(token.score, place)
        details = token.details
        assert details.probability == pytest.approx(logprobs[place, token.token_id].exp().item(), abs=1e-4)
        assert details.large_probability == pytest.approx(large[place, token.token_id].item(), abs=1e-4)
        assert details.large_token_id == large[place].argmax()
        assert details.large_token_probability == pytest.approx(large[place].max().item(), abs=1e-4)


def test_a_prompt_can_be_scored_without_a_text(start):
    version = make_version(make_proxy())
    scored = task(version, random_prompt(70, 4)[:60], num_top=0, score_prompt=True, max_new_tokens=0)
    start(version).submit([scored])
    assert scored.sink.ended(1).ids() == []
    assert len(scored.sink.events[0].scores) == 59


def test_a_stop_string_ends_a_text_before_it(start):
    proxy = make_proxy()
    version = make_version(proxy, end_ids=frozenset())
    prompt = random_prompt(5, 11)
    free = task(version, prompt, max_new_tokens=20)
    scheduler = start(version)
    scheduler.submit([free])
    text = free.sink.ended(1).text()
    assert len(text) > 8
    stopped = task(version, prompt, max_new_tokens=20, stop=(text[4:6],))
    scheduler.submit([stopped])
    assert stopped.sink.ended(1).text() == text[: text.index(text[4:6])]
    assert stopped.sink.reason() == "stop"


# --- coming and going ---------------------------------------------------------------------------------------------


class Gate:
    """A step function that waits to be let through, so that a test decides when a step happens."""

    is_remote = False

    def __init__(self, stepper):
        self._stepper = stepper
        self.model, self.new_cache, self.device = stepper.model, stepper.new_cache, stepper.device
        self._open = threading.Semaphore(0)
        self.calls = 0

    def __call__(self, *args, **kwargs):
        assert self._open.acquire(timeout=60)
        self.calls += 1
        return self._stepper(*args, **kwargs)

    def launch(self, *args, **kwargs):
        scores = self(*args, **kwargs)
        return lambda: scores

    def twin(self):
        return self

    def let(self, number=100_000):
        self._open.release(number)


def gated(name="v1", tuned_seed=2, like=None):
    """A version whose large model waits for the test."""
    proxy = make_proxy(tuned_seed=tuned_seed)
    steppers = proxy.steppers()
    steppers["large"] = like.steppers["large"] if like else Gate(steppers["large"])
    return make_version(proxy, name, steppers, end_ids=frozenset())


def until(condition, timeout_s=30):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_proxies_that_share_models_share_their_step_functions():
    first = make_proxy()
    second = ProxyModel(first.large, make_proxy(tuned_seed=4).tuned, first.untuned, vocab_size=VOCAB)
    known = first.steppers()
    steppers = second.steppers(known)
    assert steppers["large"] is known["large"]
    assert steppers["untuned"] is known["untuned"]
    assert steppers["tuned"].model is second.tuned


def test_a_service_that_drafts_has_timed_its_passes_before_the_first_request_comes(start):
    version = gated()
    gate = version.steppers["large"]
    gate.let()
    start(version, draft_tokens="auto")
    until(lambda: gate.calls)


def test_what_fails_while_passes_are_timed_leaves_the_service_running(start, monkeypatch):
    version, failed = make_version(make_proxy(), end_ids=frozenset()), threading.Event()

    def out_of_memory(_length):
        failed.set()
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedpt_flwr.drafting.DraftLength.measure", out_of_memory)
    text = task(version, [5, 6])
    start(version, draft_tokens="auto").submit([text])
    assert text.sink.ended(1).reason() == "length"
    assert failed.is_set()


def test_a_cancelled_text_frees_its_slot_at_the_next_step(start):
    version = gated()
    gate = version.steppers["large"]
    scheduler = start(version, num_slots=1)
    first = task(version, [5, 6], max_new_tokens=50)
    second = task(version, [7, 8], max_new_tokens=2)
    scheduler.submit([first])
    scheduler.submit([second])
    gate.let(3)
    until(lambda: len(first.sink.ids()) == 3)
    scheduler.cancel([first])
    gate.let()
    second.sink.ended(1)
    assert len(first.sink.ids()) <= 4  # the step that was on its way
    assert not any(isinstance(event, End) for event in first.sink.events)


def test_a_task_that_waits_can_be_cancelled_and_one_that_is_being_read(start):
    version = gated()
    gate = version.steppers["large"]
    scheduler = start(version, prefill_tokens=4)
    being_read = task(version, random_prompt(20, 1), max_new_tokens=3)
    waiting = task(version, [7, 8], max_new_tokens=3)
    last = task(version, [9, 10], max_new_tokens=3)
    scheduler.submit([being_read, waiting, last])
    gate.let(1)
    until(lambda: gate.calls == 1)
    scheduler.cancel([being_read, waiting])
    gate.let()
    last.sink.ended(1)
    assert being_read.sink.events == waiting.sink.events == []


def test_the_queue_is_bounded_and_first_come_first_served(start):
    version = gated()
    gate = version.steppers["large"]
    scheduler = start(version, num_slots=1, queue_size=2)
    running = task(version, [5], max_new_tokens=3)
    scheduler.submit([running])
    until(lambda: not scheduler._queue)
    waiting = [task(version, [6 + number], max_new_tokens=2) for number in range(2)]
    scheduler.submit(waiting)
    with pytest.raises(QueueFull) as refused:
        scheduler.submit([task(version, [9])])
    assert refused.value.retry_after_s >= 1
    order = []
    for number, one in enumerate([running, *waiting]):
        inbox = one.sink
        one.sink = lambda event, inbox=inbox, number=number: (inbox(event), order.append(number))
    gate.let()
    for inbox_owner in waiting:
        until(lambda owner=inbox_owner: order.count(1 + waiting.index(owner)) == 3)
    assert order == sorted(order)


def test_many_texts_of_one_task_wait_until_there_is_room_for_all(start):
    version = make_version(make_proxy(), end_ids=frozenset())
    scheduler = start(version, num_slots=3)
    tasks = [task(version, [5 + number], seeds=(1, 2), temperature=1.0) for number in range(4)]
    scheduler.submit(tasks)
    for one in tasks:
        one.sink.ended(2)


def test_a_deadline_ends_what_runs_and_what_waits(start):
    version = gated()
    gate = version.steppers["large"]
    scheduler = start(version, num_slots=1)
    running = task(version, [5], max_new_tokens=50)
    waiting = task(version, [6], max_new_tokens=2)
    after = task(version, [7], max_new_tokens=2)
    scheduler.submit([running, waiting, after])
    gate.let(2)
    until(lambda: len(running.sink.ids()) == 2)
    running.deadline = waiting.deadline = time.monotonic()
    gate.let()
    after.sink.ended(1)
    for late in (running, waiting):
        assert [event.reason for event in late.sink.events if isinstance(event, Failure)] == ["deadline"]


def test_running_texts_finish_on_the_version_that_they_began_with(start):
    old = gated()
    gate = old.steppers["large"]
    new = gated("v2", tuned_seed=9, like=old)
    scheduler = start(old)
    prompt = random_prompt(6, 2)
    first = task(scheduler.version, prompt)
    scheduler.submit([first])
    gate.let(4)
    until(lambda: len(first.sink.ids()) == 4)
    scheduler.swap(new)
    assert scheduler.version is new
    second = task(scheduler.version, prompt)
    scheduler.submit([second])
    gate.let()
    expected = [
        make_proxy(tuned_seed=seed)
        .generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 6:]
        .tolist()
        for seed in (2, 9)
    ]
    assert [first.sink.ended(1).ids(), second.sink.ended(1).ids()] == expected
    assert expected[0] != expected[1]
    until(lambda: not scheduler._runners)  # nothing of the old version is kept


@pytest.mark.parametrize("shares_large", [True, False])
def test_an_old_version_is_freed_when_its_last_task_has_ended(start, shares_large):
    proxy = make_proxy()
    old = make_version(proxy, end_ids=frozenset())
    large = proxy.large if shares_large else tiny_llama(1)
    proxy = ProxyModel(large, tiny_llama(9), tiny_llama(3), vocab_size=VOCAB)
    new = make_version(proxy, "v2", proxy.steppers(old.steppers), end_ids=frozenset())
    scheduler = start(old, draft_tokens="auto")
    text = task(old, [5, 6])
    scheduler.submit([text])
    text.sink.ended(1)
    freed = [weakref.ref(old), weakref.ref(old.proxy.tuned)]
    del old, text
    scheduler.swap(new)

    def are_gone():
        gc.collect()
        return not any(part() is not None for part in freed)

    until(are_gone)


def test_a_version_that_is_loaded_again_has_rows_of_its_own(start):
    """As when a run is resumed: the same name and weights, in other memory."""
    old = gated()
    gate = old.steppers["large"]
    again = gated(like=old)
    scheduler = start(old)
    before = [task(old, random_prompt(4 + number, number)) for number in range(3)]
    scheduler.submit(before)
    gate.let(4)
    until(lambda: len(before[-1].sink.ids()) >= 2)
    scheduler.swap(again)
    after = [task(again, random_prompt(5 + number, 10 + number)) for number in range(3)]
    scheduler.submit(after)
    gate.let()
    proxy = make_proxy()
    for one in before + after:
        ids = torch.tensor([one.prompt_ids])
        expected = proxy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert one.sink.ended(1).ids() == expected[0, ids.shape[1] :].tolist()


def test_a_model_that_fails_takes_only_its_texts_along(start):
    version = make_version(make_proxy(), end_ids=frozenset())
    scheduler = start(version)
    real = version.steppers["tuned"]

    class Broken:
        model, new_cache = real.model, real.new_cache

        def __call__(self, *args, **kwargs):
            raise RuntimeError("out of memory")

    broken = make_version(version.proxy, "v2", {**version.steppers, "tuned": Broken()}, end_ids=frozenset())
    bad = task(broken, [5, 6])
    scheduler.submit([bad])
    bad.sink.wait(lambda events: events)
    assert [event.reason for event in bad.sink.events] == ["internal"]
    good = task(version, [5, 6])
    scheduler.submit([good])
    assert good.sink.ended(1).reason() == "length"


@pytest.mark.parametrize("name", ["_Prefill", "_Choice"])
def test_what_fails_between_queue_and_batch_is_told_so(start, monkeypatch, name):
    version = make_version(make_proxy(), end_ids=frozenset())
    scheduler = start(version)
    with monkeypatch.context() as patched:
        patched.setattr(f"fedpt_flwr.service.scheduler.{name}", None)
        bad = task(version, [5, 6])
        scheduler.submit([bad])
        bad.sink.wait(lambda events: events)
    assert [event.reason for event in bad.sink.events] == ["internal"]
    good = task(version, [5, 6])
    scheduler.submit([good])
    assert good.sink.ended(1).reason() == "length"


def test_stopping_takes_nothing_on_and_finishes_within_the_grace_period(start):
    version = gated()
    gate = version.steppers["large"]
    scheduler = start(version)
    running = task(version, [5], max_new_tokens=6)
    scheduler.submit([running])
    gate.let(2)
    until(lambda: len(running.sink.ids()) == 2)
    scheduler.stop(60)
    with pytest.raises(Stopping):
        scheduler.submit([task(version, [6])])
    gate.let()
    assert len(running.sink.ended(1).ids()) == 6
    assert scheduler.join(30)


def test_what_is_not_done_after_the_grace_period_is_told_so(start):
    version = gated()
    gate = version.steppers["large"]
    scheduler = start(version, num_slots=1)
    running, waiting = task(version, [5], max_new_tokens=50), task(version, [6])
    scheduler.submit([running, waiting])
    gate.let(2)
    until(lambda: len(running.sink.ids()) == 2)
    scheduler.stop(0)
    gate.let(1)
    assert scheduler.join(30)
    for one in (running, waiting):
        assert [event.reason for event in one.sink.events if isinstance(event, Failure)] == ["stopping"]
