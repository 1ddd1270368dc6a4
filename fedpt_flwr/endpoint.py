"""A service that speaks OpenAI's completions API, asked what its model says about the next token of some texts.

Texts are token ids. They are sent as such where the service takes them, else as text that must read back as the same
ids on both sides. What comes back are log-probabilities by id: all of them, or the likeliest few. A log-probability is
a score that is exact, because the softmax does not see a constant.

Requests that fail are sent again after a wait; everything that was answered is kept (``recall.py``) before anything
else is done with it. Whatever goes wrong ends in one sentence. The key is only ever read from the environment.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import math
import os
import random
import re
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import torch
from torch import Tensor

from fedpt_flwr.config import RemoteConfig
from fedpt_flwr.errors import RemoteError, RunError, VocabularyMismatch
from fedpt_flwr.recall import Recall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_Text = tuple[int, ...]

KEY_VARIABLE = "FEDPT_LARGE_API_KEY"
"""The environment variable that holds the service's key."""

URL_VARIABLE = "FEDPT_LARGE_API_URL"
"""The environment variable with the address that may be given the key although a folder names it."""

FULL, ECHO, NEXT = "full", "echo", "next"

_TRANSIENT = frozenset({408, 409, 425, 429, *range(500, 600)}) - {501, 505}  # what is not implemented never will be
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 30.0
_CONNECT_TIMEOUT_S = 10.0
_PROBE = "The quick brown fox = 1, 2;\n> jumps over [the] lazy dog?"
_SHORTEST_PROBE = 4
_COMMON_LIMITS = (100, 20, 5, 1)
"""What services are content with, where they refuse to give everything."""
_ALLOW = f"if the address is right, give it with --large-url, or in the environment variable {URL_VARIABLE}"
_UNREACHED = "look whether it runs, and whether model.large-url is its address"
_TOKEN_ID = re.compile(r"token_id:(\d{1,18})")
_SUM_TOLERANCE = 0.02
_SAME = 0.05
"""Nats by which two answers to one question may differ: servers batch and round."""


@dataclass(slots=True)
class Usage:
    """What a remote model has cost.

    Attributes:
        requests: Those that were answered.
        retries: Those that were sent again.
        tokens_sent: As the service counts them.
        tokens_received: As the service counts them.
        recalled: Places of texts that were known already and cost nothing.
        seconds: Until the answers were there, added up over requests that ran at the same time.
    """

    requests: int = 0
    retries: int = 0
    tokens_sent: int = 0
    tokens_received: int = 0
    recalled: int = 0
    seconds: float = 0.0

    def minus(self, earlier: Usage) -> Usage:
        """What was spent since then."""
        return Usage(*(getattr(self, part.name) - getattr(earlier, part.name) for part in fields(self)))

    def copy(self) -> Usage:
        """As it is now."""
        return self.minus(Usage())

    def to_json(self, config: RemoteConfig) -> dict[str, Any]:
        """For ``costs.jsonl``; with the price, if there is one."""
        row = {f"remote_{part.name}": getattr(self, part.name) for part in fields(self)}
        row["remote_seconds"] = round(self.seconds, 3)
        if config.price_sent or config.price_received:
            price = self.tokens_sent * config.price_sent + self.tokens_received * config.price_received
            row["remote_price"] = price / 1e6
        return row


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that two tokenizers share if every token has the same id in both."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda entry: (entry[1], entry[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:32]


class Endpoint:
    """One model of one service.

    Making it asks the service what it can do, which takes some requests of a few tokens.

    Args:
        url: The service's address, with or without ``/v1``.
        tokenizer: Of the small models, which must be the remote model's too.
        config: How to ask.
        cache: Where answers are kept; None: nowhere.
        named_by_folder: Whether the address is out of a run's or a proxy's folder, which may be somebody else's: the
            key is then sent only if :data:`URL_VARIABLE` holds that address.

    Attributes:
        url: The address.
        model: The model's name there.
        api: ``full``, ``echo`` or ``next``.
        vocabulary: Digest of the vocabulary.
        width: Ids that the vocabulary has.
        num_top: Tokens whose log-probabilities are shown at each place; None: all.
        sends_ids: Whether texts go as token ids.
        context: The longest text in tokens that the service takes, or None where it does not say.
        usage: What it has cost so far.
        spent_before: Tokens that count in the budget besides, such as those of earlier processes of a run.

    Raises:
        RemoteError: The service cannot be reached, refuses, or gives no log-probabilities.
        VocabularyMismatch: The remote model has another vocabulary.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        config: RemoteConfig,
        *,
        cache: Any = None,
        named_by_folder: bool = False,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.config = config
        self.usage = Usage()
        self.context: int | None = None
        self.api, self.sends_ids = FULL, True
        self.num_top: int | None = None
        self.vocabulary = vocabulary_digest(tokenizer)
        self.width = max(tokenizer.get_vocab().values()) + 1
        self._tokenizer = tokenizer
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not all("!" <= character <= "~" for character in self._key):
            raise RemoteError(  # without the value
                "the key must be printable ASCII without white space",
                place=KEY_VARIABLE,
                remedy="look how it was copied",
            )
        self._lock = threading.Lock()
        self._job = threading.local()  # has the flag by which a thread learns that it need not ask again
        self._flags: set[threading.Event] = set()  # those flags, of all that is being asked
        self._is_closed = False
        self.spent_before = 0
        self._reserved = 0
        self._adds_first = False  # the service itself puts the tokenizer's first token before a text
        self._spelling: dict[str, int | None] | None = None
        self._most_named = 0  # tokens in one place of an answer
        self._recall: Recall | None = None
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="fedpt-remote")
        allowed = os.environ.get(URL_VARIABLE, "").strip().rstrip("/").removesuffix("/v1")
        self._withholds_key = bool(self._key) and named_by_folder and allowed != self.url
        if self._withholds_key:
            _log.warning("%s is not sent to %s, whose address a folder names; %s", KEY_VARIABLE, self.url, _ALLOW)
        headers = {"authorization": f"Bearer {self._key}"} if self._key and not self._withholds_key else {}
        limits = httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency)
        self._connect_s = min(config.timeout_s, _CONNECT_TIMEOUT_S)
        timeout = httpx.Timeout(config.timeout_s, connect=self._connect_s)
        try:
            self._http = httpx.Client(headers=headers, timeout=timeout, limits=limits)
            is_address = httpx.URL(self.url).scheme in ("http", "https") and httpx.URL(self.url).host
        except (httpx.InvalidURL, UnicodeError) as error:
            raise self._error(f"the address cannot be used ({error})", remedy="look at model.large-url") from error
        if not is_address or set("@?#") & set(self.url):  # where keys are put
            raise RemoteError(
                "a remote large model's address must begin with http:// or https:// and hold no key",
                place="model.large-url",
                remedy=f"give the key in {KEY_VARIABLE}",
            )
        weakref.finalize(self, _close, self._http, self._pool)
        self.model = self._open()
        if cache is not None:
            identity = json.dumps([self.url, self.model, self.num_top, self.sends_ids, self.vocabulary])
            self._recall = Recall(cache, identity, width=self.width, max_bytes=config.cache_mb * 2**20)

    def close(self) -> None:
        """Close connections; whoever still waits to ask again gives up."""
        with self._lock:
            self._is_closed = True
            for flag in self._flags:
                flag.set()
        _close(self._http, self._pool)
        if self._recall is not None:
            self._recall.close()

    @property
    def shows(self) -> str:
        """What is seen of each distribution, for people and programs."""
        return "all" if self.num_top is None else f"top {self.num_top}"

    @property
    def asks_once(self) -> bool:
        """Whether one request tells about all places of a text."""
        return self.api != NEXT

    # --- asking ---------------------------------------------------------------------------------------------------

    def ask(
        self, texts: Sequence[Sequence[int]], places: Sequence[Sequence[int]], *, shows_next: bool = False
    ) -> list[Tensor]:
        """What the model says about the tokens that follow some places of some texts.

        Args:
            texts: Token ids.
            places: Of each text: 0 asks what follows its first token. In rising order.
            shows_next: Show the token that does follow in the text, too, where the service says how likely that is. Not
                for decoding: what can be chosen would depend on what has been drafted.

        Returns:
            Of each text the log-probabilities ``(places, width)``, float32; -inf where a token is not shown.

        Raises:
            RemoteError: The service does not answer, or not as it must; or the budget is spent. What was answered
                before is kept.
        """
        shows_next = shows_next and self.api == ECHO and self.num_top is not None
        keys = [[_key(text, place, shows_next) for place in of] for text, of in zip(texts, places, strict=True)]
        every = dict.fromkeys(key for of in keys for key in of)
        with _as_remote():
            known = self._recall.get(every) if self._recall is not None else {}
        with self._lock:
            self.usage.recalled += len(known)
        claimed = set(known)
        jobs: list[tuple[_Text, list[int]]] = []
        by_length = sorted(range(len(texts)), key=lambda row: -max(places[row], default=-1))
        for row in by_length:
            missing = [place for place, key in zip(places[row], keys[row], strict=True) if key not in claimed]
            claimed.update(keys[row])
            if missing:
                jobs.append((tuple(texts[row]), missing))
        if self.api == NEXT:
            jobs = [(text, [place]) for text, missing in jobs for place in missing]
        for rows in self._answers(jobs, shows_next):
            known |= rows
        empty = torch.empty((0, self.width))
        return [torch.stack([known[key] for key in of]) if of else empty for of in keys]

    def _answers(self, jobs: Sequence[tuple[_Text, list[int]]], shows_next: bool) -> list[dict[_Text, Tensor]]:
        """What is said about texts from some places on, asked at the same time."""
        given_up = threading.Event()
        with self._lock:
            if self._is_closed:
                raise self._error("nothing can be asked, because the connection is closed")
            self._flags.add(given_up)
        running: list[Future[dict[_Text, Tensor]]] = []
        try:
            for text, missing in jobs:
                running.append(
                    self._pool.submit(self._answer, text, missing, shows_next, given_up)
                )  # known one by one, whenever it is interrupted
            ended, others = wait(running, return_when=FIRST_EXCEPTION)
            if others:  # one has failed: what is under way is paid for and may end
                given_up.set()
                for job in others:
                    job.cancel()
                wait(others)
        except BaseException:  # Ctrl-C: nobody wants what waits to be sent, and it would be paid for
            given_up.set()
            for job in running:
                job.cancel()
            raise
        finally:
            with self._lock:
                self._flags.discard(given_up)
        return [job.result() for job in running if job in ended]

    def _answer(
        self, text: _Text, places: list[int], shows_next: bool, given_up: threading.Event
    ) -> dict[_Text, Tensor]:
        """One job: ask, check, keep."""
        self._job.given_up = given_up
        text = text[: places[-1] + 1 + shows_next]
        if self.context is not None and len(text) >= self.context:
            raise self._error(f"a text must be shorter than the {self.context} tokens that the model reads", len(text))
        if self.api == FULL:
            rows = self._ask_full(text, places[0])
        elif self.api == ECHO and places != [len(text) - 1]:
            rows = self._ask_echo(text, shows_next=shows_next)
        else:
            rows = {text: self._ask_next(text)}
        for row in rows.values():
            self._check_row(row)
        if self._recall is not None:
            with _as_remote():
                self._recall.put(rows)
        return rows

    def _ask_full(self, text: _Text, first: int) -> dict[_Text, Tensor]:
        """All log-probabilities from a place on, in as few requests as the service's limit allows."""
        number = len(text) - first
        body = {"model": self.model, "prompt": list(text), "max_tokens": 0, "full_logprobs": number}
        answer = self._post(body, len(text), may_be_too_much=number > 1)
        if answer is None:
            middle = first + number // 2
            return self._ask_full(text[:middle], first) | self._ask_full(text, middle)
        try:
            found = answer["choices"][0]["full_logprobs"]
            if (found["positions"], found["vocab_size"], found["dtype"]) != (number, self.width, "float32"):
                raise self._wrong(
                    f"log-probabilities of {number} places and {self.width} ids must come",
                    (found["positions"], found["vocab_size"], found["dtype"]),
                )
            values = np.frombuffer(base64.b64decode(found["data"], validate=True), "<f4").astype(np.float32)
            rows = torch.from_numpy(values).view(number, self.width)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, binascii.Error) as error:
            raise self._wrong("full_logprobs must hold numbers", type(error).__name__) from error
        if self.num_top is not None:
            rows = _best(rows, self.num_top)
        return {text[: first + place + 1]: rows[place].clone() for place in range(number)}

    def _ask_echo(self, text: _Text, *, shows_next: bool = False) -> dict[_Text, Tensor]:
        """The likeliest tokens at all places of a text, and after its end unless ``shows_next``."""
        choice = self._complete(text, echo=True)
        tops, owns = _tops(choice), _path(choice, "logprobs", "token_logprobs")
        shift = 1 if self._adds_first else 0  # services that add a first token leave it out of the echo
        expected = len(text) - shift
        if len(tops) not in (expected, expected + 1) or not isinstance(owns, list) or len(owns) != len(tops):
            raise self._wrong(f"an echo must have {expected} tokens", len(tops))
        rows = {}
        for index in range(1, expected):
            place = index + shift - 1
            row = self._row(tops[index])
            own = _number(owns[index])
            if shows_next and own is not None:
                row[text[place + 1]] = own
            rows[_key(text, place, shows_next)] = row
        if not shows_next:
            rows[text] = self._row(tops[expected]) if len(tops) > expected else self._ask_next(text)
        if shift:
            rows[_key(text, 0, shows_next)] = self._ask_next(text[:1])
        return rows

    def _ask_next(self, text: _Text) -> Tensor:
        """The likeliest tokens after a text."""
        choice = self._complete(text)
        tops = _tops(choice)
        if tops:
            return self._row(tops[0])
        # The service has ended the text and says nothing about the token that does: so nothing is likelier. The others
        # are shown if that one is forbidden, and it has what they leave.
        end = self._tokenizer.eos_token_id
        choice = self._complete(text, logit_bias={str(end): -100})
        tops = _tops(choice)
        if not tops:
            raise self._wrong("logprobs must name the likeliest tokens", choice.get("logprobs"))
        row = self._row(tops[0])
        if row[end].isfinite():  # it was forbidden to be chosen and not to be shown
            return row
        left = max(1 - float(row.exp().sum()), float(row.max().exp()))
        row[end] = math.log(min(left, 1.0))
        return row

    def _complete(self, text: Sequence[int], *, echo: bool = False, logit_bias: Any = None) -> Mapping[str, Any]:
        """A request for one token more, checked to be about this text; its only choice."""
        body = {
            "model": self.model,
            "prompt": list(text) if self.sends_ids else self._as_text(text),
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.num_top or self.width,
            **({"echo": True} if echo else {}),
            **({"logit_bias": logit_bias} if logit_bias else {}),
            **({"return_tokens_as_token_ids": True} if self._names_ids else {}),
        }
        answer = self._post(body, len(text) + 1)
        counted = _path(answer, "usage", "prompt_tokens")
        if isinstance(counted, int) and counted != len(text):
            raise _OtherLength(
                f"a text of {len(text)} tokens must have as many to the service",
                value=counted,
                place=self.url,
                remedy="it has another tokenizer, or adds tokens; use a service that takes token ids",
            )
        choice = _path(answer, "choices", 0)
        if not isinstance(choice, dict):
            raise self._wrong("an answer must have a choice", str(self._without_key(answer)))
        return choice

    _names_ids = True  # `return_tokens_as_token_ids`, until a service refuses it

    def _as_text(self, text: Sequence[int]) -> str:
        """The text, if it reads back as these tokens."""
        ids = list(text[1:] if self._adds_first else text)
        shown = self._decode(ids)
        again = self._tokenizer(shown, add_special_tokens=False, verbose=False)["input_ids"]
        if list(again) != ids or (self._adds_first and text[:1] != (self._tokenizer.bos_token_id,)):
            raise self._error(
                "a text must read back as the same tokens, because this service takes no token ids",
                shown[-60:],
                remedy="use a service that does, such as vLLM or fedpt serve",
            )
        return shown

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    # --- answers --------------------------------------------------------------------------------------------------

    def _row(self, top: Any) -> Tensor:
        """Log-probabilities by id from those by name; names of several ids, or of none, are left out.

        Some services add the text's own token to the likeliest: what is more than was asked for is left out, too.
        """
        values = {name: _number(value) for name, value in top.items()} if isinstance(top, dict) else {}
        known = {name: value for name, value in values.items() if value is not None}
        if not isinstance(top, dict) or len(known) < len(top):
            raise self._wrong("log-probabilities must come as an object of names and numbers", top)
        self._most_named = max(self._most_named, len(known))
        row = torch.full((self.width,), -torch.inf)
        for name in sorted(known, key=lambda name: -known[name])[: self.num_top]:
            token_id = self._id_of(name)
            if token_id is not None:
                row[token_id] = known[name]
        if not bool(row.isfinite().any()):
            raise _NoneKnown(
                "a place must show at least one token by a name of its own",
                value=self._without_key(list(top)[:5]),
                place=self.url,
                remedy="use a service that names token ids",
            )
        return row

    def _id_of(self, name: str) -> int | None:
        if found := _TOKEN_ID.fullmatch(name):
            return int(found[1]) if int(found[1]) < self.width else None
        if self._spelling is None:
            self._spelling = _spellings(self._tokenizer)
        return self._spelling.get(name)

    def _check_row(self, row: Tensor) -> None:
        total = float(row.exp().sum())
        if not total <= 1 + _SUM_TOLERANCE or (self.num_top is None and total < 1 - _SUM_TOLERANCE):
            raise self._wrong(
                "probabilities must add up to 1 where all are shown, and to less where not", round(total, 4)
            )

    # --- requests -------------------------------------------------------------------------------------------------

    def _post(self, body: Mapping[str, Any], num_tokens: int, *, may_be_too_much: bool = False) -> Any:
        """Send a request until it is answered.

        Args:
            body: Of ``/v1/completions``.
            num_tokens: What it will cost, for the budget.
            may_be_too_much: Return None where the service says that so many log-probabilities are too many.
        """
        budget = self.config.token_budget
        with self._lock:
            spent = self.spent_before + self.usage.tokens_sent + self.usage.tokens_received + self._reserved
            if budget and spent + num_tokens > budget:
                raise RemoteError(
                    f"the remote large model's budget of {budget:,} tokens does not allow another request",
                    value=f"{spent:,} spent, {num_tokens:,} wanted",
                    place="remote.token-budget",
                    remedy=self._and_kept("raise it and go on"),
                )
            self._reserved += num_tokens
        try:
            begun = time.monotonic()
            response = self._send("POST", "/v1/completions", body)
            if may_be_too_much and response.status_code == 400 and _code(response) == "too_many_logprobs":
                return None
            answer = self._body(response)
            with self._lock:
                self.usage.requests += 1
                self.usage.seconds += time.monotonic() - begun
                for name, part in (("tokens_sent", "prompt_tokens"), ("tokens_received", "completion_tokens")):
                    counted = _path(answer, "usage", part)
                    fallback = num_tokens if part == "prompt_tokens" else 0
                    number = counted if isinstance(counted, int) and counted >= 0 else fallback
                    setattr(self.usage, name, getattr(self.usage, name) + number)
            return answer
        finally:
            with self._lock:
                self._reserved -= num_tokens

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """A response that is no transient failure; whatever else it is, it is not looked at."""
        given_up: threading.Event = getattr(self._job, "given_up", None) or threading.Event()
        for attempt in range(self.config.retries + 1):
            wait_s = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt) * random.uniform(0.5, 1)
            try:
                response = self._whole(method, path, body)
            except httpx.ConnectTimeout:
                problem, remedy = f"cannot be reached within {self._connect_s:g} s", _UNREACHED
            except httpx.TimeoutException:
                problem = f"did not answer within {self.config.timeout_s:g} s"
                remedy = "look whether it is overloaded, else raise remote.timeout-s"
            except (httpx.HTTPError, OSError) as error:
                reason = self._without_key(f"{type(error).__name__}: {error}")
                problem, remedy = f"cannot be reached ({reason})", _UNREACHED
            else:
                if response.status_code not in _TRANSIENT:
                    return response
                problem = f"answers with status {response.status_code}: {self._said(response)}"
                remedy = "wait, or lower remote.concurrency"
                after = response.headers.get("retry-after", "")
                wait_s = min(_LONGEST_WAIT_S, float(after)) if after.isdecimal() else wait_s
                if response.headers.get("x-should-retry") == "false":
                    raise self._error(f"the service {problem}", remedy=remedy)
            if attempt == self.config.retries or given_up.is_set():
                break
            _log.info("the remote large model %s; asking again in %.1f s", problem, wait_s)
            if given_up.wait(wait_s):
                break
            with self._lock:
                self.usage.retries += 1
        raise self._error(f"the service {problem}, asked {attempt + 1} times", remedy=self._and_kept(remedy))

    def _whole(self, method: str, path: str, body: Any) -> httpx.Response:
        """A response to its end; httpx's own time-out begins again with every piece of it.

        Raises:
            httpx.HTTPError: There is none within the time that a request may take.
        """
        until = time.monotonic() + self.config.timeout_s
        pieces = []
        with self._http.stream(method, self.url + path, json=body) as response:
            for piece in response.iter_raw():
                pieces.append(piece)
                if time.monotonic() > until:
                    raise httpx.ReadTimeout("it goes on and on")
        return httpx.Response(response.status_code, headers=response.headers, content=b"".join(pieces))

    def _and_kept(self, remedy: str) -> str:
        return remedy if self._recall is None else f"{remedy}; what was answered is kept"

    def _body(self, response: httpx.Response) -> Any:
        """What a response holds, if it is no refusal."""
        if response.has_redirect_location:
            raise self._error(
                f"the service must not redirect, but does so with status {response.status_code}",
                self._without_key(response.headers["location"]),
                remedy="give the address to which it redirects, up to /v1, in model.large-url",
            )
        if response.status_code >= 400:
            needs_key = response.status_code in (401, 403)
            remedy = f"give its key in the environment variable {KEY_VARIABLE}" if needs_key else None
            if needs_key and self._withholds_key:
                remedy = f"the key is not sent to an address that a folder names: {_ALLOW}"
            if response.status_code == 404:
                remedy = "look whether model.large-url is all that stands before /v1/completions in its address"
            raise (RemoteError if needs_key else _Refused)(
                f"the service refuses with status {response.status_code}: {self._said(response)}",
                place=self.url,
                remedy=remedy,
            )
        try:
            return _json(response)
        except ValueError as error:
            raise self._wrong("an answer must be JSON", self._without_key(response.text)[:80]) from error

    def _said(self, response: httpx.Response) -> str:
        """What the service has to say about a failure; never the key, which some repeat."""
        try:
            said = _json(response)
            said = _path(said, "error", "message") or _path(said, "message") or _path(said, "detail") or said
        except ValueError:
            said = response.text
        return self._without_key(" ".join(str(said).split()))[:200] or "no reason given"

    def _without_key(self, value: Any) -> Any:
        """A value of JSON without the key, wherever it stands."""
        if not self._key:
            return value
        if isinstance(value, str):
            return value.replace(self._key, "***")
        if isinstance(value, dict):
            return {self._without_key(name): self._without_key(part) for name, part in value.items()}
        return [self._without_key(part) for part in value] if isinstance(value, list | tuple) else value

    def _error(self, rule: str, value: Any = None, *, remedy: str | None = None) -> RemoteError:
        return RemoteError(self._without_key(rule), value=self._without_key(value), place=self.url, remedy=remedy)

    def _wrong(self, rule: str, value: Any, *, remedy: str | None = None) -> RemoteError:
        rule, value = self._without_key(f"the service answers wrongly: {rule}"), self._without_key(value)
        return _Refused(rule, value=value, place=self.url, remedy=remedy)

    # --- what the service can do ----------------------------------------------------------------------------------

    def _open(self) -> str:
        """Find out how to ask; the model's name."""
        listed = self._body(self._send("GET", "/v1/models"))
        data = _path(listed, "data")
        cards = [card for card in data if isinstance(card, dict) and "id" in card] if isinstance(data, list) else []
        if not cards:
            raise self._wrong("/v1/models must name a model", listed)
        names = [str(card["id"]) for card in cards]
        is_ours = any(card.get("owned_by") == "fedpt" for card in cards)
        name = self.config.model or ("large" if is_ours else names[0] if len(names) == 1 else "")
        if name not in names:
            raise RemoteError(
                f"must be one of the service's models: {', '.join(self._without_key(names[:20]))}",
                value=name or None,
                place="remote.model",
            )
        card = cards[names.index(name)]
        length = card.get("max_model_len") or _path(card, "meta", "n_ctx_train")  # vLLM's, llama.cpp's
        self.context = length if isinstance(length, int) else None
        self.model = name
        top = self.config.top_logprobs
        if is_ours and self.config.api in ("auto", FULL):
            info = self._body(self._send("GET", "/info"))
            self._check_digest(info)
            self.context = info.get("context") if isinstance(info.get("context"), int) else None
            if info.get("full_logprobs"):
                self.num_top = top if 0 < top < self.width else None
                return name
        if self.config.api == FULL:
            raise self._error(
                "the service gives no full log-probabilities",
                remedy="set remote.api='auto'; of a service of this project look at its --full-logprobs",
            )
        self._probe(top)
        return name

    def _check_digest(self, info: Any) -> None:
        ours, theirs = self.vocabulary, _path(info, "vocabulary")
        if theirs != ours:
            raise VocabularyMismatch(
                f"the remote model must have the small models' vocabulary (digest {ours})",
                value=self._without_key(theirs),
                place=self.url,
                remedy="serve a model of the small model's family",
            )

    def _probe(self, top: int) -> None:
        """Try ids or text, how many log-probabilities, and whether an echo can be believed."""
        probe = tuple(self._tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"])
        if len(probe) < _SHORTEST_PROBE:
            raise self._error("the tokenizer must be able to read English", len(probe))
        self.api = NEXT
        limits = [top] if top else [self.width, *_COMMON_LIMITS]
        last: _Refused | None = None
        for sends_ids, names_ids in ((True, True), (True, False), (False, True), (False, False)):
            self.sends_ids, self._names_ids = sends_ids, names_ids
            for self.num_top in limits:
                self._most_named = 0
                try:
                    row = self._try_next(probe)
                except _Refused as error:  # not one that is slow, or asks for a key: those would refuse everything
                    last = error
                    continue
                if self.num_top >= self.width and bool(row.isfinite().all()):
                    self.num_top = None
                else:  # some give less than they are asked for and do not say so
                    self.num_top = min(self.num_top, self._most_named)
                self._choose_api(probe)
                return
        raise last or self._error("the service gives no log-probabilities")

    def _try_next(self, probe: _Text) -> Tensor:
        """What follows the probe; finds out whether a first token is added to texts."""
        try:
            return self._try_next_with_first(probe)
        except _NoneKnown as error:  # after plain English, that is no matter of names
            raise VocabularyMismatch(
                "the remote model must have the small models' vocabulary, but knows none of the tokens that it names",
                value=error.value,
                place=self.url,
                remedy="choose a remote model of the small model's family",
            ) from error

    def _try_next_with_first(self, probe: _Text) -> Tensor:
        self._adds_first = False
        try:
            return self._ask_next(probe)
        except _OtherLength as error:
            first, found = self._tokenizer.bos_token_id, error.value
            if self.sends_ids:
                raise
            if first is None or found != len(probe) + 1:
                raise VocabularyMismatch(
                    f"the remote model must have the small models' vocabulary; a text of {len(probe)} tokens has "
                    "another number there",
                    value=found,
                    place=self.url,
                    remedy="choose a remote model of the small model's family",
                ) from error
        self._adds_first = True
        return self._ask_next((first, *probe))

    def _choose_api(self, probe: _Text) -> None:
        """Believe an echo only if it says what a request for the next token alone does."""
        if self.config.api == NEXT:
            return
        text = ((self._tokenizer.bos_token_id,) if self._adds_first else ()) + probe
        half = text[: len(text) // 2 + 1]
        try:
            echoed = self._ask_echo(text)
            alone = self._ask_next(half)
        except _Refused as error:
            _log.info("the remote large model gives no echo: %s", error)
            agrees = False
        else:
            both = echoed[half].isfinite() & alone.isfinite()
            agrees = bool(both.any()) and bool((echoed[half][both] - alone[both]).abs().max() < _SAME)
        if agrees:
            self.api = ECHO
        elif self.config.api == ECHO:
            raise self._error(
                "the service's echo must have the log-probabilities that it gives for the next token alone",
                remedy="set remote.api='next'",
            )


class _Refused(RemoteError):
    """The service does not do what was asked of it: it may do something else."""


class _NoneKnown(_Refused):
    """A place of an answer at which no name is that of one token; the names are the ``value``."""


class _OtherLength(_Refused):
    """A text has another number of tokens there, which is the ``value``."""


@contextmanager
def _as_remote() -> Iterator[None]:
    """Say what is wrong with the answers that are kept as a failure of the remote model: it ends the same requests."""
    try:
        yield
    except RunError as error:
        raise RemoteError(error.rule, value=error.value, place=error.place, remedy=error.remedy) from error


def _close(http: httpx.Client, pool: ThreadPoolExecutor) -> None:
    pool.shutdown(wait=False, cancel_futures=True)
    http.close()


def _key(text: Sequence[int], place: int, shows_next: bool) -> _Text:
    """By what an answer is kept: the text before it, and apart from those the answers that show the next token."""
    return (*text[: place + 2], -1) if shows_next else tuple(text[: place + 1])


def _best(rows: Tensor, number: int) -> Tensor:
    """Rows of which only the likeliest ids are left."""
    values, ids = rows.topk(number, dim=-1)
    return torch.full_like(rows, -torch.inf).scatter(-1, ids, values)


def _spellings(tokenizer: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """The id of every token by what services call it; None for what several are called.

    Most services call a token by its text, some by its entry in the vocabulary. Some show special tokens as nothing;
    of these only the one that ends a text is ever likely.
    """
    by_text: dict[str, int | None] = {}
    by_entry: dict[str, int | None] = {}
    for entry, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        once = str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        twice = str(tokenizer.decode([token_id, token_id], clean_up_tokenization_spaces=False))
        # Some tokenizers drop a text's first space: the second token has it.
        text = (twice[len(once) :] or once) if "\ufffd" not in once and twice.startswith(once) else once
        for names, name in ((by_text, text), (by_entry, entry)):
            names[name] = None if name in names else token_id
    if tokenizer.eos_token_id is not None:
        by_text[""] = int(tokenizer.eos_token_id)
    return by_entry | by_text


def _tops(choice: Mapping[str, Any]) -> list[Any]:
    """The likeliest tokens at each place, by name; empty where there are none.

    They come in the form of OpenAI's older interface, or in that of its newer one, in which llama.cpp also says the id.
    """
    found = _path(choice, "logprobs", "top_logprobs")
    if isinstance(found, list):
        return found
    content = _path(choice, "logprobs", "content")
    return [_by_name(_path(place, "top_logprobs")) for place in content] if isinstance(content, list) else []


def _by_name(top: Any) -> dict[str, Any] | None:
    if not isinstance(top, list) or not all(isinstance(entry, dict) for entry in top):
        return None
    return {
        f"token_id:{entry['id']}" if isinstance(entry.get("id"), int) else str(entry.get("token")): entry.get("logprob")
        for entry in top
    }


def _path(value: Any, *keys: str | int) -> Any:
    """What lies at the end of a path through objects and lists; None where there is no such path."""
    for key in keys:
        if isinstance(key, int) and isinstance(value, list) and key < len(value):
            value = value[key]
        elif isinstance(key, str) and isinstance(value, dict):
            value = value.get(key)
        else:
            return None
    return value


def _number(value: Any) -> float | None:
    """A number of JSON; None for what is none, or too large."""
    try:
        return float(value) if type(value) in (int, float) else None
    except OverflowError:
        return None


def _json(response: httpx.Response) -> Any:
    """What a response holds.

    Raises:
        ValueError: It is no JSON, or is nested too deep.
    """
    try:
        return response.json()
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _code(response: httpx.Response) -> Any:
    try:
        return _path(_json(response), "error", "code")
    except ValueError:
        return None
