"""The proxies that a service answers with: how one is loaded, and how a newer one is noticed.

A run writes each round's proxy into a folder of its own and then points a link at it. :class:`Watcher` looks at that
link now and then, loads what it points at beside what is being served, and hands over a whole :class:`Version`; one
that cannot be loaded is reported, and the old one stays. The large model, and the untuned one where its weights are
not the adapter's base, are shared by all versions.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedpt_flwr.config import RemoteConfig, RunConfig
from fedpt_flwr.endpoint import vocabulary_digest
from fedpt_flwr.errors import DataError, FedPTError, RunError, VocabularyMismatch
from fedpt_flwr.models import fingerprint, load_tokenizer, pick_device
from fedpt_flwr.prompts import Template
from fedpt_flwr.proxy import ProxyModel
from fedpt_flwr.ragged import Stepper
from fedpt_flwr.remote import RemoteModel, remote_large
from fedpt_flwr.runs import LATEST, PROMPT_FORM, find_run, read_json, recorded_config
from fedpt_flwr.sources import held_out_items
from fedpt_flwr.speculative import PARTS
from fedpt_flwr.vocabulary import missing_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_NUM_EXAMPLES = 12

_LONGEST_PAUSE_S = 60.0
"""Between two tries to load a version that cannot be loaded."""

_Mark = tuple[Path, int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class Version:
    """A proxy as it was after one round, ready to be asked.

    Attributes:
        name: What responses call it.
        run: Name of the run's folder.
        server_round: The round, or None where the folder does not say.
        proxy: The model.
        tokenizer: Of all three models.
        steppers: A step function for each of :data:`PARTS`.
        end_ids: Tokens that end a text.
        max_new_tokens: Longest answer of the run's own scoring, in tokens.
        template: How the run makes prompts from records.
        is_chat: Whether its examples were conversations, written by the tokenizer's chat template if it has one.
        examples: Some of the run's test items: ``prompt`` and ``answer``.
        max_prompt_chars: No prompt that is longer can fit the context; None where no model says what that is.
        folder: The run's folder, or None for a proxy of no run.
    """

    name: str
    run: str
    server_round: int | None
    proxy: ProxyModel
    tokenizer: PreTrainedTokenizerBase
    steppers: Mapping[str, Stepper]
    end_ids: frozenset[int]
    max_new_tokens: int
    template: Template
    examples: Sequence[Mapping[str, str]]
    folder: Path | None = None
    max_prompt_chars: int | None = None
    is_chat: bool = False
    vocabulary: str = ""
    """Digest of the vocabulary."""
    mark: _Mark | None = None
    """What told this state of the run's proxy from others when loading began."""

    @property
    def vocab_size(self) -> int:
        """Ids that are tokens."""
        return int(self.proxy.config.real_vocab_size)

    @property
    def scores(self) -> Mapping[str, Any] | None:
        """The run's final rows, ``exact_match`` and ``loss`` by name; None before its end.

        Read when they are asked for: a run writes them after the proxy of its last round.
        """
        return None if self.folder is None else _scores(self.folder)

    @cached_property
    def missing(self) -> Tensor | None:
        """The ids that the large model has no token for, ``(tokens,)``; None where it has all."""
        return missing_ids(self.proxy.large)

    def unreadable(self, ids: Sequence[int]) -> list[int]:
        """Those of some ids that the large model has no token for."""
        if self.missing is None:
            return []
        missing = set(self.missing.tolist())
        return [number for number in ids if number in missing]

    @property
    def context(self) -> int | None:
        """The longest text in tokens, prompt and answer together; None where no model says.

        Texts of all lengths are read in one pass, so none may be past the length at which a model's keys change.
        """
        return self.proxy.steady_context


class Loader:
    """Loads versions of runs, the same models only once.

    Args:
        large: Where the large model lies on this machine, if not where the runs found it; or the model itself.
        device: ``auto`` or a torch device.
        alpha: Strength of the shift instead of the runs'.
        plausibility: Mask threshold instead of the runs'.
        prepare: Lay out the weights for decoding, each model's once.
        large_device_map: How the large model is divided among this machine's devices, if not as the run says.
    """

    def __init__(
        self,
        *,
        large: str | RemoteModel | None = None,
        device: str = "auto",
        alpha: float | None = None,
        plausibility: float | None = None,
        prepare: bool = False,
        large_device_map: str | None = None,
    ) -> None:
        self._large = large
        self._large_device_map = large_device_map
        self._device = str(pick_device(device))
        self._alpha = alpha
        self._plausibility = plausibility
        self._prepare = prepare
        self._last: Version | None = None
        self._remote: tuple[str, RemoteConfig, str, RemoteModel] | None = None

    def _remote_of(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> RemoteModel | None:
        """The run's own model behind an API, if it has one; that of the last version where it is the same."""
        asked = (config.model.large_url, config.remote, vocabulary_digest(tokenizer))
        if self._remote is None or self._remote[:3] != asked:
            model = remote_large(config, tokenizer)
            self._remote = None if model is None else (*asked, model)
        return None if self._remote is None else self._remote[3]

    def load(self, run: Path) -> Version:
        """Load what a run's link ``proxy`` points at.

        Raises:
            RunError: The folder is no run, or the run has no complete round.
            ModelError: The proxy is damaged, or a model of it cannot be loaded.
            VocabularyMismatch: The large model is asked at a service for texts of another vocabulary.
        """
        mark = _mark(run)  # first: a round that completes while the models load is another one
        target = mark[0]
        config = recorded_config(run)
        last = self._last
        tokenizer = load_tokenizer(str(target))
        vocabulary = vocabulary_digest(tokenizer)
        large = self._remote_of(config, tokenizer) if self._large is None else self._large
        if isinstance(large, RemoteModel) and large.endpoint.vocabulary != vocabulary:  # a run that is followed
            raise VocabularyMismatch(
                f"the remote large model was connected to with another vocabulary (digest {large.endpoint.vocabulary})",
                value=vocabulary,
                place=str(run),
                remedy="serve this run by itself",
            )
        proxy = ProxyModel.from_pretrained(
            target,
            large=large,
            large_device_map=self._large_device_map,
            device=self._device,
            like=None if last is None else last.proxy,
        )
        if self._alpha is not None:
            proxy.alpha = self._alpha
        if self._plausibility is not None:
            proxy.plausibility = self._plausibility
        tuned_fingerprint = fingerprint(proxy.tuned)
        if self._prepare:  # after all that reads weights; what the last version shares is prepared already
            proxy.prepare()
        steppers = proxy.steppers(None if last is None else last.steppers)
        context = proxy.steady_context
        server_round = int(target.parent.name) if target.parent.name.isdecimal() else None
        template, is_chat = read_prompt_form(target, config)
        ends = proxy.generation_config.eos_token_id
        same_run = last is not None and last.run == run.name
        self._last = Version(
            name=f"{run.name}.r{server_round or 0:04d}.{tuned_fingerprint[:8]}",
            run=run.name,
            server_round=server_round,
            proxy=proxy,
            tokenizer=tokenizer,
            steppers=steppers,
            end_ids=frozenset([ends] if isinstance(ends, int) else ends or ()),
            max_new_tokens=config.scoring.max_new_tokens,
            template=template,
            is_chat=is_chat,
            examples=last.examples if last is not None and same_run else _examples(config, tokenizer),
            folder=run,
            vocabulary=vocabulary,
            mark=mark,
            max_prompt_chars=None if context is None else context * max(map(len, tokenizer.get_vocab())),
        )
        return self._last


class Watcher:
    """Looks for newer versions in a thread of its own.

    Args:
        loader: Loads them.
        run: The run that is served; with ``follow`` the first one.
        served: Mark of the version that is served.
        follow: Go over to whatever run is the newest.
        poll_s: Seconds between two looks.
        on_version: Called in the watcher's thread with a version that is loaded.
        on_failure: Called with why one was not; the same reason is not repeated.
    """

    def __init__(
        self,
        loader: Loader,
        run: Path,
        *,
        served: _Mark | None,
        follow: bool,
        poll_s: float,
        on_version: Callable[[Version], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._loader = loader
        self._run = run
        self._follow = follow
        self._poll_s = poll_s
        self._on_version = on_version
        self._on_failure = on_failure
        self._served = served
        self._failed: _Mark | None = None  # the last one tried that is not served
        self._pause = 1  # looks from one try to load that version to the next, doubled by each
        self._num_passed = 0  # looks since the last try
        self._reported = ""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fedpt-watcher", daemon=True)

    def start(self) -> None:
        """Start looking."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._poll_s):
            try:
                self.look()
            except Exception as error:  # a version that is not there yet, or half removed: the old one goes on
                if not isinstance(error, FedPTError | OSError):
                    _log.exception("a new version could not be loaded")
                if str(error) != self._reported:
                    self._reported = str(error)
                    self._on_failure(self._reported)

    def look(self) -> None:
        """Load the version that is there now, if it is not the one that is served."""
        run = self._run
        if self._follow:
            newest = find_run(LATEST, root=run.parent)
            if (newest / "proxy").is_dir():  # a run gets its link with its first round
                run = newest
        mark = _mark(run)
        if mark == self._served or self._must_wait(mark):
            return
        version = self._loader.load(run)
        self._run, self._served, self._reported = run, version.mark, ""
        self._on_version(version)

    def _must_wait(self, mark: _Mark) -> bool:
        """Whether a version was tried lately and could not be loaded: trying takes as much as loading."""
        if mark != self._failed:
            self._failed, self._pause, self._num_passed = mark, 1, 0
            return False
        self._num_passed += 1
        wanted = min(2 * self._pause, max(1, round(_LONGEST_PAUSE_S / self._poll_s)))
        if self._num_passed < wanted:
            return True
        self._pause, self._num_passed = wanted, 0
        return False


def proxy_target(run: Path) -> Path:
    """What a run's link ``proxy`` points at.

    Raises:
        RunError: There is none.
    """
    if not (run / "proxy").is_dir():
        raise RunError(
            "the run has no proxy: it ended, or is, before its first round was complete",
            place=str(run),
            remedy="wait for its first round, or name another run",
        )
    return (run / "proxy").resolve()


def _mark(run: Path) -> _Mark:
    """What changes when a run's proxy does; a resumed run may write the same round again."""
    target = proxy_target(run)
    try:
        config = (target / "config.json").stat()
    except OSError as error:
        raise RunError(
            f"a proxy must have a config.json that can be read ({error.strerror})",
            place=str(target),
            remedy="copy the run again, or name another one",
        ) from error
    return target, config.st_mtime_ns, config.st_ino


def read_prompt_form(target: Path, config: RunConfig) -> tuple[Template, bool]:
    """How a proxy's prompts are written: the template, and whether conversations are the chat template's business.

    Args:
        target: The proxy's folder; runs that wrote no ``prompt.json`` had one template in their config.
        config: The run's.

    Raises:
        RunError: ``prompt.json`` is damaged.
    """
    path = target / PROMPT_FORM
    if not path.is_file():
        return Template(config.data.template), False
    found = read_json(path)
    try:
        return Template(found["template"]), found["format"] == "chat"
    except (KeyError, TypeError, DataError) as error:
        raise RunError(
            "must say format and template", value=found, place=str(path), remedy="copy the run's folder again"
        ) from error


def _examples(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, str]]:
    try:
        items = held_out_items(config.data, "test", seed=config.seed, tokenizer=tokenizer).first(_NUM_EXAMPLES)
    except FedPTError as error:  # the data may be on another machine; the service does without
        _log.info("no example prompts: %s", error)
        return []
    return [{"prompt": item.prompt, "answer": item.answer} for item in items.examples]


def _scores(run: Path) -> dict[str, Any] | None:
    if not (run / "results.json").is_file():
        return None
    try:
        rows = read_json(run / "results.json")["rows"]
        return {
            name: {key: row.get(key) for key in ("exact_match", "loss")}
            for name, row in rows.items()
            if name in (*PARTS, "proxy")
        }
    except (RunError, KeyError, TypeError, AttributeError):  # only something to show
        return None
