"""Recorded passes: on a GPU as graphs, and everywhere with a recorder that only runs the same pass again."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_packing import adapted
from test_ragged import FAMILIES, alone, make, random_ids, read

from fedpt_flwr import graphs
from fedpt_flwr.drafting import StepCosts
from fedpt_flwr.graphs import GraphedStepper, graphed
from fedpt_flwr.lean import step_function
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.ragged import Stepper

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


class Again:
    """Records a pass the way a graph does, as far as one can tell: run in between, and into the same tensor.

    Attributes:
        shapes: Of the scores of every pass that was recorded.
        num_replays: How often any was repeated.
    """

    def __init__(self):
        self.shapes = []
        self.num_replays = 0

    def __call__(self, run, device):
        for _ in range(3):
            scores = run()
        self.shapes.append(tuple(scores.shape))

        def replay():
            self.num_replays += 1
            scores.copy_(run())
            return scores

        return replay

    def wait(self):
        pass

    def anew(self):
        return self


class Fails(Again):
    """A recorder that cannot."""

    def __init__(self, error):
        super().__init__()
        self.error = error
        self.num_calls = 0

    def __call__(self, run, device):
        self.num_calls += 1
        raise self.error


def recorded(model, device, *args):
    """A step function with recorded passes, and its recorder."""
    record = Again() if device == "cpu" else graphs._Graphs()
    return GraphedStepper(step_function(model.to(device), *args), record), record


def close(found, expected):
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_come_and_go_score_as_they_would_alone(name, device):
    if name == "mixtral" and device == "cuda":
        pytest.skip("its experts are multiplied in groups, which in float32 takes a copy that no graph can hold")
    settings = {"attn_implementation": "eager"} if "eager" in name else {}
    plain, model = make(name, **settings), make(name, **settings)
    step, _ = recorded(model, device)
    prompts = [random_ids(length, seed=length) for length in (5, 21, 3, 21)]
    read_together, after_prompts = read(step, prompts)
    for prompt, scores in zip(prompts, after_prompts, strict=True):
        close(scores, alone(plain, prompt)[0])
    cache = step.new_cache()
    rows = []
    for number in (2, 0, 1):
        cache.append(read_together, number)
        rows.append(prompts[number])
    del read_together
    for turn in range(9):
        num_new = (1, 3, 1, 5)[turn % 4]
        new = random_ids(len(rows), num_new, seed=100 + turn)
        scores = step(cache, new, keep=0)
        rows = [torch.cat([row, ids]) for row, ids in zip(rows, new, strict=True)]
        assert cache.lengths == [len(row) for row in rows]
        for row, of_row in zip(rows, scores, strict=True):
            close(of_row, alone(plain, row, num_new))
        if turn == 2:
            cache.remove(0)
            rows[0] = rows.pop()
        if turn in (4, 6):
            kept = [len(row) - 1 - number for number, row in enumerate(rows)]
            cache.cut(kept)
            rows = [row[:length] for row, length in zip(rows, kept, strict=True)]


def test_passes_are_recorded_once_for_each_rounded_size():
    step, record = recorded(make("llama"), "cpu")
    cache = step.new_cache()
    cache.add_rows(3)
    for num_new in (1, 3, 4, 1, 2, 3):
        step(cache, random_ids(3, num_new))
    assert record.shapes == [(4, 1, 64), (4, 4, 64), (4, 2, 64)]
    assert record.num_replays == 6


def test_what_it_answers_stays_when_it_is_asked_again():
    step, _ = recorded(make("llama"), "cpu")
    cache = step.new_cache()
    cache.add_rows(1)
    first = step(cache, torch.tensor([[5]]))
    kept = first.clone()
    step(cache, torch.tensor([[6]]))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("keep", [1, 2, 0, torch.tensor([0, 2])])
def test_only_the_wanted_positions_are_scored(keep):
    model = make("llama")
    step, record = recorded(model, "cpu")
    ordinary = step_function(model)
    caches = [ordinary.new_cache(), step.new_cache()]
    for cache in caches:
        cache.add_rows(2)
    expected, found = (
        one(cache, random_ids(2, 3), keep=keep) for one, cache in zip((ordinary, step), caches, strict=True)
    )
    assert record.num_replays == 1
    close(found, expected)


def test_a_second_cache_waits_until_the_first_is_gone():
    model = make("llama")
    step, record = recorded(model, "cpu")
    prompts = [random_ids(7, seed=1), random_ids(9, seed=2)]
    caches = []
    for prompt in prompts:
        cache = step.new_cache()
        cache.add_rows(1)
        step(cache, prompt[None, :4])
        caches.append(cache)
    assert record.num_replays == 1
    for number, prompt in enumerate(prompts):
        close(step(caches[number], prompt[None, 4:])[0], alone(model, prompt))
    assert record.num_replays == 2
    del caches[0], cache
    close(step(caches[0], torch.tensor([[7]]))[0], alone(model, torch.cat([prompts[1], torch.tensor([7])])))
    assert record.num_replays == 3


def test_a_cache_that_outgrows_the_memory_takes_its_tokens_along(monkeypatch):
    monkeypatch.setattr(graphs, "_COLUMNS", 8)
    model = make("llama")
    step, record = recorded(model, "cpu")
    cache = step.new_cache()
    cache.add_rows(1)
    text = random_ids(90)
    for place in range(90):
        scores = step(cache, text[None, place : place + 1])
    close(scores[0], alone(model, text))
    assert record.num_replays == 90
    other = step.new_cache()
    for _ in range(5):  # more rows than there is room for, by copies of one
        other.append(cache, 0)
    del cache
    new = random_ids(5, 1)
    for row, scores in enumerate(step(other, new)):
        close(scores, alone(model, torch.cat([text, new[row]])))
    assert record.num_replays == 91


def test_near_the_end_of_the_context_passes_are_not_filled_up():
    model = make("gpt2")  # whose positions are looked up
    step, record = recorded(model, "cpu")
    cache = step.new_cache()
    cache.add_rows(1)
    text = random_ids(96)
    step(cache, text[None, :90])
    before = record.num_replays
    close(step(cache, text[None, 90:], keep=0)[0], alone(model, text, 6))
    assert record.num_replays == before


def test_long_passes_are_left_to_the_step_function():
    step, record = recorded(make("llama"), "cpu")
    cache = step.new_cache()
    cache.add_rows(8)
    step(cache, random_ids(8, 9))
    assert record.num_replays == 0
    step(cache, random_ids(8, 8))
    assert record.num_replays == 1
    cache.add_rows(32)
    step(cache, random_ids(40, 8))
    assert record.num_replays == 1


def test_weights_that_lie_elsewhere_now_are_recorded_anew():
    model, other = make("llama"), make("llama")
    step, record = recorded(model, "cpu")
    for weight in other.parameters():
        weight.mul_(0.9)
    for _ in range(2):
        cache = step.new_cache()
        cache.add_rows(1)
        scores = step(cache, torch.tensor([[5]]))
        close(scores[0], alone(model, torch.tensor([5])))
        for weight, theirs in zip(model.parameters(), other.parameters(), strict=True):
            weight.data = theirs.data
    assert len(record.shapes) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_one_copy_of_the_small_weights_serves_with_the_adapter_and_without(device):
    proxy = ProxyModel(make("llama"), adapted(make("llama")))
    prompt = random_ids(6)
    with proxy.without_adapter():
        without = alone(proxy.tuned, prompt)[0]
    with_it = alone(proxy.tuned, prompt)[0]
    proxy.to(device)
    on, _ = recorded(proxy.tuned, device)
    off, _ = recorded(proxy.tuned, device, proxy.without_adapter)
    for _ in range(2):
        close(read(on, [prompt])[1][0], with_it)
        close(read(off, [prompt])[1][0], without)
    assert (with_it - without).abs().max() > 0.01


def test_memory_made_in_inference_mode_can_be_used_outside_of_it():
    model = make("llama")
    step, record = recorded(model, "cpu")
    text = random_ids(20)
    with torch.inference_mode():
        cache = step.new_cache()
        cache.add_rows(1)
        step(cache, text[None, :12])  # not recorded
        close(step(cache, text[None, 12:14])[0], alone(model, text[:14]))
        step(cache, text[None, 14:])
    cache = step.new_cache()
    cache.add_rows(1)
    close(step(cache, text[None, :5])[0], alone(model, text[:5]))
    assert record.num_replays == 3


def test_where_recording_fails_the_text_goes_on_without():
    model = make("llama")
    step, record = recorded(model, "cpu")
    cache = step.new_cache()
    cache.add_rows(1)
    text = random_ids(9)
    step(cache, text[None, :1])
    step._record = fails = Fails(RuntimeError("must not wait\nwhile it records"))
    step(cache, text[None, 1:4])
    assert step.failure == "must not wait"
    close(step(cache, text[None, 4:], keep=0)[0], alone(model, text, 5))
    assert fails.num_calls == 1
    assert record.num_replays == 1
    assert step.twin() is step


def test_without_memory_it_rests_and_then_tries_again(monkeypatch):
    monkeypatch.setattr(graphs, "_REST", 3)
    model = make("llama")
    step, record = recorded(model, "cpu")
    cache = step.new_cache()
    cache.add_rows(1)
    text = random_ids(9)
    step._record = fails = Fails(torch.OutOfMemoryError("none"))
    for place in range(3):
        step(cache, text[None, place : place + 1])
    assert fails.num_calls == 1
    step._record = record
    close(step(cache, text[None, 3:], keep=0)[0], alone(model, text, 6))
    assert record.num_replays == 1


def test_threads_do_not_get_into_each_others_texts():
    model = make("llama")
    step, _ = recorded(model, "cpu")
    texts = [random_ids(40, seed=seed) for seed in range(8)]
    expected = [alone(model, text, 40) for text in texts]
    together = threading.Barrier(2)

    def read_slowly(text):
        cache = step.new_cache()
        cache.add_rows(1)
        together.wait(timeout=60)
        return torch.cat([step(cache, text[None, place : place + 1])[0] for place in range(40)])

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(read_slowly, texts))
    finally:
        sys.setswitchinterval(switching)
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_passes_are_timed_as_recorded_ones_also_beside_a_text():
    step, record = recorded(make("llama"), "cpu")
    cache = step.new_cache()
    cache.add_rows(3)
    step(cache, random_ids(3, 1))
    before = record.num_replays
    StepCosts({"large": step}).seconds("large", 2)
    assert record.num_replays == before + 3
    assert step._memory.user is cache


def test_memory_for_many_rows_and_for_many_columns_is_not_the_product():
    step, _ = recorded(make("llama", max_position_embeddings=4096), "cpu")
    for num_rows, length in ((32, 1), (1, 3000), (2, 3000)):
        cache = step.new_cache()
        cache.add_rows(num_rows)
        step(cache, torch.zeros((num_rows, length), dtype=torch.int64))
        step(cache, torch.zeros((num_rows, 1), dtype=torch.int64))
        assert step._memory.user is cache
    assert (step._memory.num_rows, step._memory.num_columns) == (2, 3072)


def test_a_model_that_is_converted_is_looked_at_again():
    model = make("llama")
    step, record = recorded(model, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        cache = step.new_cache()
        cache.add_rows(1)
        assert step(cache, torch.tensor([[5]])).dtype == dtype
    assert record.num_replays == 2


def test_nothing_is_recorded_on_a_cpu():
    step = step_function(make("llama"))
    assert graphed(step) is step


@needs_gpu
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prepared_proxy_on_a_gpu_writes_what_an_unprepared_one_does(name):
    settings = {"attn_implementation": "eager"} if "eager" in name else {}
    models = [make(name, **settings).to("cuda") for _ in range(3)]
    for weight in models[1].parameters():
        weight.add_(torch.randn_like(weight) * 0.05)
    proxy = ProxyModel(*models)
    prompt = random_ids(2, 9).to("cuda")
    expected = proxy.generate(prompt, max_new_tokens=24, do_sample=False)
    proxy.prepare()
    for draft_tokens in (0, 3, "auto"):
        found = proxy.generate(prompt, max_new_tokens=24, do_sample=False, draft_tokens=draft_tokens)
        assert torch.equal(found, expected)
    kinds = {type(step) for step in proxy.steppers().values()}
    assert kinds == {GraphedStepper} or (name == "mixtral" and kinds == {Stepper})


@needs_gpu
def test_a_model_that_waits_for_results_decodes_without_graphs():
    model = make("llama").to("cuda")
    layer = model.model.layers[0].mlp.register_forward_hook(lambda *given: given[2] * float(given[2].sum() * 0 + 1))
    step = step_function(model)
    assert type(graphed(step)) is Stepper
    layer.remove()
    assert type(graphed(step_function(model))) is GraphedStepper


@needs_gpu
def test_graphs_do_not_need_the_scratch_memory_that_others_give_back():
    model = make("llama", hidden_size=2048, intermediate_size=8192, head_dim=64).to("cuda", torch.bfloat16)
    step = graphed(step_function(model))
    assert type(step) is GraphedStepper
    scores = []
    for _ in range(2):
        cache = step.new_cache()
        cache.add_rows(1)
        scores.append(step(cache, torch.tensor([[5, 6, 7, 8]]), keep=0))
        torch._C._cuda_clearCublasWorkspaces()  # as torch.compile does before it records graphs
        torch.cuda.empty_cache()
    torch.cuda.synchronize()
    assert torch.equal(*scores)
