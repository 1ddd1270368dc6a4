"""The whole method on each model family: a table of families by features, every cell of which is run.

    python benchmarks/conformance.py                        all cells; about three minutes on one core
    python benchmarks/conformance.py --rows opt,gpt-2       some rows
    python benchmarks/conformance.py --markdown             the table as docs/models.md has it

A cell is a function below that runs the real thing and fails with an assertion, or returns what it found. The exit
status is the number of cells that failed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the two apps lie beside the package

from benchmarks.families import FAMILIES, LARGE_ONLY, Checkpoints
from fedpt_flwr.config import flat_values, parse_run_config
from fedpt_flwr.data import TokenizedExample, collate_prompts, tokenize_prompts
from fedpt_flwr.grid import run_locally
from fedpt_flwr.losses import answer_losses
from fedpt_flwr.models import load_causal_lm, load_tokenizer, make_tunable, output_size, tunable_arrays
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.runs import find_run, read_json

PROMPTS = ("> hey, what's the juice on this one?\n[Skomund]\n", "filter =", "light = amber - good to go!\nmaker")
NEW_TOKENS = 12
QUICK: Mapping[str, Any] = {
    "num-server-rounds": 1,
    "train.max-steps": 2,
    "train.batch-size": 4,
    "train.max-length": 120,
    "scoring.num-items": 3,
    "scoring.round-items": 2,
    "scoring.max-new-tokens": 6,
    "scoring.few-shot": 0,
    "distillation.steps": 2,
    "distillation.num-prompts": 4,
    "distillation.final-steps": 2,
    "distillation.final-num-prompts": 4,
}
"""A federation of some seconds on the demo world's data."""

_run_ids = itertools.count(1)


@dataclass
class Subject:
    """One row: a small and a large checkpoint, and what was made of them so far.

    Attributes:
        name: Of the row.
        small: Folder of the small model.
        large: Folder of the large model.
        work: Where runs are put.
    """

    name: str
    small: Path
    large: Path
    work: Path
    _runs: dict[str, Path] = field(default_factory=dict)
    _texts: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def flat(self, mode: str) -> dict[str, Any]:
        """The run config of a federation that tunes in this mode."""
        return flat_values(parse_run_config({})) | {
            **QUICK,
            "model.small": str(self.small),
            "model.large": str(self.large),
            "tuning.mode": mode,
            "tuning.lora-rank": 4,
            "distillation.mode": "final" if mode == "full" else "carry",
            "output-dir": str(self.work / mode),
        }

    def run(self, mode: str) -> Path:
        """The folder of a federation of two devices, run by the real apps when it is first asked for."""
        if mode not in self._runs:
            import client_app
            import server_app

            run_locally(server_app.app, client_app.app, self.flat(mode), num_devices=2, run_id=next(_run_ids))
            self._runs[mode] = find_run(root=self.work / mode)
        return self._runs[mode]

    @cached_property
    def tokenizer(self) -> Any:
        """The small model's."""
        return load_tokenizer(str(self.small))

    @cached_property
    def prompts(self) -> list[list[int]]:
        """:data:`PROMPTS` as the method makes them."""
        return tokenize_prompts(PROMPTS, self.tokenizer, max_length=None)

    @cached_property
    def parts(self) -> tuple[Any, Any, Any]:
        """Large, tuned and untuned, each loaded by transformers alone: nothing of this project has touched them."""
        from transformers import AutoModelForCausalLM

        folders = (self.large, self.run("full") / "proxy" / "tuned", self.small)
        large, tuned, untuned = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in folders)
        return large, tuned, untuned

    @cached_property
    def large_ids(self) -> Tensor:
        """For each of the small tokenizer's ids the large tokenizer's id of the same token, -1 for none."""
        ours, theirs = load_tokenizer(str(self.large)).get_vocab(), self.tokenizer.get_vocab()
        ids = torch.full((max(theirs.values()) + 1,), -1)
        for token, number in theirs.items():
            ids[number] = ours.get(token, -1)
        return ids

    @torch.no_grad()
    def reference_scores(self, ids: Sequence[int]) -> Tensor:
        """``(len(ids), tokens)``: three whole passes, and the formula as it is written."""
        large, tuned, untuned = self.parts
        known = self.large_ids
        small = torch.tensor([list(ids)])
        of_large = large(known[small]).logits[0][:, known.clamp_min(0)].masked_fill(known < 0, -torch.inf)
        of_tuned, of_untuned = (model(small).logits[0, :, : len(known)] for model in (tuned, untuned))
        return of_large.float() + (of_tuned.float() - of_untuned.float())

    def reference_text(self, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
        """What greedy decoding writes, to the first end."""
        if tuple(ids) in self._texts:
            return self._texts[tuple(ids)]
        text = list(ids)
        while len(text) < len(ids) + NEW_TOKENS:
            text.append(int(self.reference_scores(text)[-1].argmax()))
            if text[-1] in ends:
                break
        self._texts[tuple(ids)] = text[len(ids) :]
        return text[len(ids) :]


# --- cells ------------------------------------------------------------------------------------------------------------


def check_config(subject: Subject) -> str:
    """`fedpt check-config` finds nothing wrong."""
    from typer.testing import CliRunner

    from fedpt_flwr.cli import app

    settings = {key: value for key, value in subject.flat("full").items() if key.startswith(("model.", "train."))}
    lines = [f'"{key}" = {json.dumps(value)}' for key, value in settings.items()]
    file = subject.work / "run-config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    result = CliRunner().invoke(app, ["check-config", "--run-config", str(file)])
    assert result.exit_code == 0, result.output
    return "ok"


def full_round(subject: Subject) -> str:
    """A federation in which devices tune all weights; the large model's files stay as they are."""
    before = _contents(subject.large)
    rows = read_json(subject.run("full") / "results.json")["rows"]
    assert {"large", "untuned", "tuned", "proxy", "device"} <= rows.keys()
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in rows.values())
    assert rows["tuned"]["loss"] != rows["untuned"]["loss"]
    assert _contents(subject.large) == before
    return "ok"


def lora_round(subject: Subject) -> str:
    """A federation in which devices tune an adapter; nobody says where it goes."""
    run = subject.run("lora")
    rows = read_json(run / "results.json")["rows"]
    assert rows["tuned"]["loss"] != rows["untuned"]["loss"]
    names = read_json(run / "proxy" / "tuned" / "adapter_config.json")["target_modules"]
    targets = {name.rsplit(".", 1)[-1] for name in names}
    model = load_causal_lm(str(subject.small))
    head = model.get_output_embeddings()
    linear = {
        name.rsplit(".", 1)[-1]
        for name, part in model.named_modules()
        if (isinstance(part, torch.nn.Linear) or type(part).__name__ == "Conv1D") and part is not head
    }
    assert targets == linear, f"{targets} and {linear}"
    return ", ".join(sorted(targets))


def tied_once(subject: Subject) -> str:
    """Tied embeddings are sent once; others both."""
    model = load_causal_lm(str(subject.small))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    sent = tunable_arrays(make_tunable(model, parse_run_config({}).tuning, seed=0))
    assert sum(array.numel() for array in sent.values()) == model.num_parameters()
    wide = [name for name, array in sent.items() if array.shape[0] == output_size(model)]
    assert len(wide) == (1 if tied else 2), wide
    return "tied" if tied else "not tied"


def padded_vocabulary(subject: Subject) -> str:
    """Rows behind the last token are scored by nobody and written by nobody."""
    proxy, padding = _loaded(subject), output_size(load_causal_lm(str(subject.large))) - len(subject.tokenizer)
    scores = proxy(input_ids=torch.tensor([subject.prompts[0]])).logits
    real = max(subject.tokenizer.get_vocab().values()) + 1
    assert bool(scores[..., real:].isinf().all())
    assert int(scores[..., :real].isfinite().sum(-1).min()) > 0.9 * real
    return f"{padding} rows"


def formula(subject: Subject) -> str:
    """The scores of a proxy loaded from its folder are the formula's."""
    proxy = _loaded(subject)
    for ids in subject.prompts:
        expected = subject.reference_scores(ids)
        found = proxy(input_ids=torch.tensor([ids])).logits[0, :, : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-3)
    return "ok"


def plain(subject: Subject) -> str:
    """`generate()` without drafts and with transformers' own loop: one row, and rows padded on the left."""
    return _same_texts(subject, (None, 0))


def speculative(subject: Subject) -> str:
    """`generate()` with drafts, as loaded and laid out for decoding."""
    _same_texts(subject, (3, "auto"))
    proxy = _loaded(subject).prepare()
    _same_texts(subject, (3,), proxy)
    kinds = {name: type(step).__name__ for name, step in proxy.steppers().items()}
    return "lean" if set(kinds.values()) == {"LeanStepper"} else "ok"


def adapter(subject: Subject) -> str:
    """A proxy whose untuned model is the tuned one without its adapter writes the same drafted or not."""
    proxy = ProxyModel.from_pretrained(subject.run("lora"))
    assert proxy.untuned is None
    texts = [_written(subject, proxy, drafts) for drafts in (None, 0, 3)]
    assert texts[0] == texts[1] == texts[2], texts
    return "ok"


def types(subject: Subject) -> str:
    """float32, bfloat16 and float16: finite scores near those in float32, texts of the asked length."""
    ids = torch.tensor([subject.prompts[0]])
    exact = _loaded(subject)(input_ids=ids).logits
    real = exact.isfinite()
    for dtype, near in (("bfloat16", 0.2), ("float16", 0.03)):
        proxy = ProxyModel.from_pretrained(subject.run("full"), dtype=dtype)
        scores = proxy(input_ids=ids).logits
        assert bool((scores.isfinite() == real).all())
        off = (scores[real] - exact[real]).square().mean().sqrt() / exact[real].std()
        assert off < near, f"{dtype}: {off}"
        written = proxy.generate(ids, max_new_tokens=4, do_sample=False, draft_tokens=2, min_new_tokens=4)
        assert written.shape[1] == ids.shape[1] + 4
    return "32, b16, 16"


def ends(subject: Subject) -> str:
    """Each token that the large model or the tokenizer calls an end ends a text, drafted or not."""
    proxy = _loaded(subject)
    found = proxy.generation_config.eos_token_id
    found = [found] if isinstance(found, int) else list(found)
    assert subject.tokenizer.eos_token_id in found
    own = _list(load_causal_lm(str(subject.large)).generation_config.eos_token_id)
    translated = {int(number) for end in own for number in (subject.large_ids == end).nonzero()[:, 0]}
    assert translated <= set(found), (translated, found)
    prompt = torch.tensor([subject.prompts[0]])
    for end, drafts in itertools.product(found, (None, 2)):
        written = proxy.generate(
            prompt, max_new_tokens=5, do_sample=False, draft_tokens=drafts, sequence_bias={(end,): 1e4}
        )
        assert written[0, prompt.shape[1] :].tolist() == [end]
    return str(len(found))


def sides(subject: Subject) -> str:
    """A text's scores do not depend on padding beside it, left or right, whatever token pads."""
    proxy = _loaded(subject)
    longest = max(map(len, subject.prompts))
    alone = [proxy(input_ids=torch.tensor([ids])).logits[0, -1] for ids in subject.prompts]
    for pad in {subject.tokenizer.pad_token_id, 5}:
        left = collate_prompts(subject.prompts, pad)
        scores = proxy(**left, position_ids=(left["attention_mask"].cumsum(-1) - 1).clamp_min(0)).logits[:, -1]
        ids, mask = torch.full((len(alone), longest), pad), torch.zeros((len(alone), longest), dtype=torch.int64)
        for row, prompt in enumerate(subject.prompts):
            ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(prompt), 1
        right = proxy(input_ids=ids, attention_mask=mask).logits
        for row, prompt in enumerate(subject.prompts):
            torch.testing.assert_close(scores[row], alone[row], rtol=1e-4, atol=2e-3)
            torch.testing.assert_close(right[row, len(prompt) - 1], alone[row], rtol=1e-4, atol=2e-3)
    return "ok"


def scoring(subject: Subject) -> str:
    """Losses of answers in one batch are those of the formula, one answer after the other."""
    answers = tokenize_prompts(
        ("fluid = oil", "good to go! - and a little more", "x"), subject.tokenizer, max_length=None
    )
    examples = [TokenizedExample(*pair) for pair in zip(subject.prompts, answers, strict=True)]
    pad_id, vocab_size = subject.tokenizer.pad_token_id, len(subject.large_ids)
    found = answer_losses(_loaded(subject), examples, pad_id=pad_id, batch_size=8, vocab_size=vocab_size).nats
    for nats, example in zip(found, examples, strict=True):
        text = [*example.prompt_ids, *example.answer_ids]
        logs = subject.reference_scores(text)[len(example.prompt_ids) - 1 : -1].double().log_softmax(-1)
        expected = -logs.gather(1, torch.tensor(example.answer_ids)[:, None]).sum()
        assert abs(float(nats) - float(expected)) < 1e-3 * abs(float(expected)) + 1e-3, (nats, expected)
    return "ok"


def chat(subject: Subject) -> str:
    """The service's chat endpoint answers what `generate()` writes behind the conversation, streamed or not."""
    tokenizer, run = subject.tokenizer, subject.run("full")
    said = "what is the juice?"
    # The run's own template; what stands behind its first field ends the prompt.
    _check_chat(subject, run, said, tokenize_prompts([said + "]\n"], tokenizer, max_length=None)[0])
    if not tokenizer.chat_template:
        return "run's template"
    # As a run on conversations leaves it.
    with tempfile.TemporaryDirectory() as folder:
        of_chats = Path(shutil.copytree(run, Path(folder) / run.name, symlinks=True))
        form = of_chats / "proxy" / "prompt.json"
        form.write_text(json.dumps(read_json(form) | {"format": "chat"}))
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        _check_chat(subject, of_chats, said, tokenizer(text, add_special_tokens=False)["input_ids"])
    return "both templates"


def _check_chat(subject: Subject, run: Path, question: str, ids: list[int]) -> None:
    """The endpoint reads a question as these ids, and answers as `generate()` does."""
    proxy, tokenizer = _loaded(subject), subject.tokenizer
    expected = _written(subject, proxy, None, [ids])[0]
    stops = _list(proxy.generation_config.eos_token_id)
    written = expected[:-1] if expected[-1] in stops else expected
    before, whole = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (ids, [*ids, *written])
    )
    said = whole[len(before) :]  # a space in front is the answer's, where tokenizers drop a text's first one
    messages = [{"role": "user", "content": question}]
    request = {"model": "proxy", "messages": messages, "temperature": 0, "max_tokens": NEW_TOKENS}
    with _service(run) as client:
        answer = client.post("/v1/chat/completions", json=request)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["usage"]["prompt_tokens"] == len(ids), (body["usage"], len(ids))
        assert body["choices"][0]["message"]["content"] == said, (body["choices"][0]["message"]["content"], said)
        streamed = client.post("/v1/chat/completions", json={**request, "stream": True}).text
        events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == said


CELLS: Mapping[str, Callable[[Subject], str]] = {
    "check-config": check_config,
    "round, all weights": full_round,
    "round, LoRA": lora_round,
    "embeddings": tied_once,
    "padding of the large vocabulary": padded_vocabulary,
    "formula": formula,
    "generate, plain": plain,
    "generate, drafts": speculative,
    "generate, adapter": adapter,
    "types": types,
    "ends": ends,
    "padding left, right": sides,
    "losses": scoring,
    "chat endpoint": chat,
}
"""What is run of every row, by the heading of its column."""

OF_SMALL = ("round, LoRA", "embeddings", "generate, adapter")
"""Cells that say something about the small model, and are not run again beside another large one."""


def cells_of(name: str) -> list[str]:
    """The headings of a row's cells."""
    return [heading for heading in CELLS if name in FAMILIES or heading not in OF_SMALL]


# --- what cells share -------------------------------------------------------------------------------------------------


def _loaded(subject: Subject) -> ProxyModel:
    return ProxyModel.from_pretrained(subject.run("full"))


def _list(ids: int | list[int] | None) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or ())


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def _written(
    subject: Subject, proxy: ProxyModel, drafts: Any, prompts: Sequence[Sequence[int]] | None = None
) -> list[list[int]]:
    """What `generate()` writes behind each prompt, all in one batch."""
    prompts = subject.prompts if prompts is None else prompts
    batch = collate_prompts([list(ids) for ids in prompts], subject.tokenizer.pad_token_id)
    width = batch["input_ids"].shape[1]
    rows = proxy.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False, draft_tokens=drafts)[:, width:].tolist()
    stops = _list(proxy.generation_config.eos_token_id)
    return [ids[: next((n + 1 for n, token in enumerate(ids) if token in stops), len(ids))] for ids in rows]


def _same_texts(subject: Subject, all_drafts: Sequence[Any], proxy: ProxyModel | None = None) -> str:
    proxy = proxy or _loaded(subject)
    stops = _list(proxy.generation_config.eos_token_id)
    expected = [subject.reference_text(ids, stops) for ids in subject.prompts]
    for drafts in all_drafts:
        together = _written(subject, proxy, drafts)
        assert together == expected, (drafts, together, expected)
        alone = [_written(subject, proxy, drafts, [ids])[0] for ids in subject.prompts]
        assert alone == expected, (drafts, alone, expected)
    return "ok"


@contextlib.contextmanager
def _service(run: Path) -> Iterator[Any]:
    """A client of the real service, in this process and without a port."""
    from fastapi.testclient import TestClient

    from fedpt_flwr.service.app import create_app
    from fedpt_flwr.service.guard import Service, ServiceConfig
    from fedpt_flwr.service.metrics import Metrics
    from fedpt_flwr.service.scheduler import Limits, Scheduler
    from fedpt_flwr.service.versions import Loader

    loops: list[asyncio.AbstractEventLoop] = []

    def deliver(events: Any) -> None:
        for sink, event in events:
            loops[0].call_soon_threadsafe(sink, event)

    metrics = Metrics()
    scheduler = Scheduler(Loader(device="cpu").load(run), Limits(), metrics, deliver, num_threads=1)

    def on_start(loop: asyncio.AbstractEventLoop) -> None:
        loops.append(loop)
        scheduler.start()

    app = create_app(Service(scheduler=scheduler, metrics=metrics, config=ServiceConfig()), on_start=on_start)
    try:
        with TestClient(app) as client:
            yield client
    finally:
        scheduler.stop(0)
        scheduler.join(10)


# --- the table --------------------------------------------------------------------------------------------------------


def markdown(found: Mapping[str, Mapping[str, str]]) -> str:
    """Rows of families, columns of features."""
    head = ["", *CELLS]
    rows = [[name, *(cells.get(heading, "") for heading in CELLS)] for name, cells in found.items()]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Run cells and print what they found; the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="some rows, separated by commas")
    parser.add_argument("--cells", help="some columns, separated by semicolons")
    parser.add_argument("--markdown", action="store_true", help="print the table alone")
    arguments = parser.parse_args()
    names = arguments.rows.split(",") if arguments.rows else [*FAMILIES, *LARGE_ONLY]
    wanted = arguments.cells.split(";") if arguments.cells else list(CELLS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, dict[str, str]] = {}
    failed = 0
    with tempfile.TemporaryDirectory() as work:
        checkpoints = Checkpoints(Path(work) / "checkpoints")
        for name in names:
            subject = Subject(name, *checkpoints.pair(name), Path(work) / "runs" / name.replace(" ", "-"))
            found[name] = {}
            for heading in [cell for cell in cells_of(name) if cell in wanted]:
                begun = time.perf_counter()
                try:
                    found[name][heading] = CELLS[heading](subject)
                except Exception as error:  # a cell that fails is what is looked for
                    failed += 1
                    found[name][heading] = "**fails**"
                    if not arguments.markdown:
                        traceback.print_exc()
                    print(f"{name}: {heading}: {type(error).__name__}: {error}"[:600], file=sys.stderr)
                if not arguments.markdown:
                    print(
                        f"{name}: {heading}: {found[name][heading]} ({time.perf_counter() - begun:.1f} s)", flush=True
                    )
            shutil.rmtree(subject.work, ignore_errors=True)
    print(markdown(found))
    return failed


if __name__ == "__main__":
    sys.exit(main())
