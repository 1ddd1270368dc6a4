"""From the scheduler's events to the bodies that OpenAI's clients read, whole or in pieces."""

from __future__ import annotations

import base64
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fedpt_flwr.models import hides_tokens, is_remote
from fedpt_flwr.service.scheduler import Details, End, Event, Failure, PromptScores, Token, TokenScore
from fedpt_flwr.service.schemas import ChatCompletionRequest, CompletionRequest, OpenAIError
from fedpt_flwr.service.text import token_bytes, token_text
from fedpt_flwr.service.versions import Version

_FAILURES = {
    # The official client would try these again by itself, and they would fail again.
    "deadline": (408, "timeout_error", {"x-should-retry": "false"}),
    "stopping": (503, "server_error", {"retry-after": "5"}),
    # The service itself has tried again.
    "remote": (503, "server_error", {"x-should-retry": "false", "retry-after": "30"}),
    "internal": (500, "server_error", {"x-should-retry": "false"}),
}


class _Text:
    """One text as far as it has come."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.scores: list[TokenScore] = []
        self.details: list[dict[str, Any]] = []
        self.reason: str | None = None


class Answer(ABC):
    """The answer to one request: collects events, or turns each into chunks.

    Args:
        body: The request.
        version: What it is answered with.
        prompts: Token ids of each prompt.
    """

    kind: str
    """What ids begin with."""
    name: str
    """Of the object, whole."""
    chunk_name: str
    """Of the object, in pieces."""
    default_max_tokens: int | None = None
    scores_prompt = False

    def __init__(
        self,
        body: CompletionRequest | ChatCompletionRequest,
        version: Version,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._body = body
        self._version = version
        self._prompts = prompts
        self._id = f"{self.kind}-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._texts = [_Text() for _ in range(len(prompts) * body.n)]
        self._open = len(self._texts)
        self._shown: dict[int, str] = {}
        self._large = _large_source(body, version)
        self.prompt_tokens = sum(map(len, prompts))
        self.completion_tokens = 0

    @property
    def complete(self) -> bool:
        """Whether all texts are."""
        return not self._open

    # --- whole ----------------------------------------------------------------------------------------------------

    def add(self, number: int, event: Event) -> None:
        """Take in an event of a prompt.

        Raises:
            OpenAIError: The event is a failure.
        """
        if isinstance(event, Token):
            text = self._text(number, event)
            text.parts.append(event.text)
            if event.score is not None:
                text.scores.append(event.score)
            if event.details is not None:
                text.details.append(self._detail(event.token_id, event.details))
        elif isinstance(event, End):
            text = self._text(number, event)
            text.parts.append(event.text)
            text.reason = event.reason
        elif isinstance(event, PromptScores):
            self._take_prompt_scores(number, event)
        self._count(event)

    def whole(self) -> dict[str, Any]:
        """The body of the answer."""
        choices = []
        for index, text in enumerate(self._texts):
            choice = {"index": index, **self._message(index, text), "finish_reason": text.reason}
            if self._body.details:
                choice["fedpt"] = text.details
            choices.append(choice)
        return {**self._head(self.name), "choices": choices, "usage": self._usage()}

    # --- in pieces ------------------------------------------------------------------------------------------------

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """What can be said before there is a token."""
        yield from ()

    def chunks(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds.

        Raises:
            OpenAIError: The event is a failure.
        """
        self._count(event)
        if isinstance(event, Token):
            if event.text or event.score is not None or event.details is not None:
                index = self._index(number, event)
                piece = self._piece(index, event.text, [event.score] if event.score is not None else None)
                if event.details is not None:
                    piece["fedpt"] = [self._detail(event.token_id, event.details)]
                yield self._chunk({"index": index, **piece, "finish_reason": None})
        elif isinstance(event, End):
            index = self._index(number, event)
            yield self._chunk({"index": index, **self._piece(index, event.text, None), "finish_reason": event.reason})
        elif isinstance(event, PromptScores):
            self._take_prompt_scores(number, event)

    def last_chunks(self) -> Iterator[dict[str, Any]]:
        """What is said when all texts are complete."""
        if self._body.include_usage:
            yield {**self._head(self.chunk_name), "choices": [], "usage": self._usage()}

    # --- parts ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _message(self, index: int, text: _Text) -> dict[str, Any]:
        """A whole choice's text and log-probabilities."""

    @abstractmethod
    def _piece(self, index: int, text: str, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        """A chunk's text and log-probabilities."""

    def _take_prompt_scores(self, number: int, event: PromptScores) -> None:
        """Keep a prompt's scores, where they can be asked for."""
        raise NotImplementedError

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self._body.model,
            "system_fingerprint": self._version.name,
            **self._large,
        }

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._head(self.chunk_name), "choices": [choice]}
        if self._body.include_usage:
            chunk["usage"] = None
        return chunk

    def _usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def _count(self, event: Event) -> None:
        if isinstance(event, Token):
            self.completion_tokens += 1
        elif isinstance(event, End):
            self._open -= 1
        elif isinstance(event, Failure):
            status, kind, headers = _FAILURES[event.reason]
            raise OpenAIError(status, event.message, type=kind, code=event.reason, headers=headers)

    def _index(self, number: int, event: Token | End) -> int:
        return number * self._body.n + event.choice

    def _text(self, number: int, event: Token | End) -> _Text:
        return self._texts[self._index(number, event)]

    def _token(self, token_id: int) -> str:
        """A token as text by itself."""
        if token_id not in self._shown:
            self._shown[token_id] = token_text(self._version.tokenizer, token_id)
        return self._shown[token_id]

    def _detail(self, token_id: int, details: Details) -> dict[str, Any]:
        return {
            "token": self._token(token_id),
            "id": token_id,
            "probability": details.probability,
            "large_probability": details.large_probability,
            "large_token": self._token(details.large_token_id),
            "large_token_probability": details.large_token_probability,
            "changed": details.large_token_id != token_id,
        }


class LegacyAnswer(Answer):
    """The answer of ``/v1/completions``."""

    kind = "cmpl"
    name = "text_completion"
    chunk_name = "text_completion"
    default_max_tokens = 16  # OpenAI's

    def __init__(self, body: CompletionRequest, version: Version, prompts: Sequence[Sequence[int]]) -> None:
        super().__init__(body, version, prompts)
        self._echo = (
            [prompt if isinstance(prompt, str) else str(version.tokenizer.decode(prompt)) for prompt in body.prompts]
            if body.echo
            else []
        )
        self.scores_prompt = (body.echo and body.num_top is not None) or body.full_logprobs is not None
        self._prompt_scores: dict[int, Sequence[TokenScore]] = {}
        self._full: dict[int, dict[str, Any]] = {}
        self._names_ids = body.return_tokens_as_token_ids
        self._offsets = [0] * len(self._texts)

    def chunks(self, number: int, event: Event) -> Iterator[dict[str, Any]]:
        """What an event adds; the prompt is repeated before a text's first token."""
        if self._echo and self._offsets[number * self._body.n] == 0 and not isinstance(event, Failure | PromptScores):
            for index in range(number * self._body.n, (number + 1) * self._body.n):
                echo = self._echo[number]
                logprobs = self._echo_logprobs(number, index)
                self._offsets[index] = max(1, len(echo))
                yield self._chunk({"index": index, "text": echo, "logprobs": logprobs, "finish_reason": None})
        yield from super().chunks(number, event)

    def _take_prompt_scores(self, number: int, event: PromptScores) -> None:
        if event.full is not None:
            self._full[number] = _packed(event.full)
        if self._echo:
            self._prompt_scores[number] = event.scores

    def _message(self, index: int, text: _Text) -> dict[str, Any]:
        number = index // self._body.n
        content = "".join(text.parts)
        logprobs = None
        if self._body.num_top is not None:
            logprobs = self._echo_logprobs(number, index) or _no_logprobs()
            for name, values in self._logprobs(index, text.scores).items():
                logprobs[name] += values
        message = {"text": self._echo[number] + content if self._echo else content, "logprobs": logprobs}
        return message | ({"full_logprobs": self._full[number]} if number in self._full else {})

    def _piece(self, index: int, text: str, scores: Sequence[TokenScore] | None) -> dict[str, Any]:
        return {"text": text, "logprobs": None if scores is None else self._logprobs(index, scores)}

    def _echo_logprobs(self, number: int, index: int) -> dict[str, list[Any]] | None:
        """Those of a prompt's tokens; the first follows nothing, so it has none."""
        if number not in self._prompt_scores:
            return None
        logprobs = _no_logprobs()
        first = self._name(self._prompts[number][0])
        self._offsets[index] = len(first)
        for name, value in (("tokens", first), ("token_logprobs", None), ("top_logprobs", None), ("text_offset", 0)):
            logprobs[name].append(value)
        for name, values in self._logprobs(index, self._prompt_scores[number]).items():
            logprobs[name] += values
        return logprobs

    def _logprobs(self, index: int, scores: Sequence[TokenScore]) -> dict[str, list[Any]]:
        logprobs = _no_logprobs()
        for score in scores:
            token = self._name(score.token_id)
            logprobs["tokens"].append(token)
            logprobs["token_logprobs"].append(score.logprob)
            # Several tokens may look alike, such as parts of characters: of those the likeliest is named.
            best = {self._name(token_id): value for token_id, value in reversed(score.top)}
            logprobs["top_logprobs"].append(dict(reversed(best.items())))
            logprobs["text_offset"].append(self._offsets[index])
            self._offsets[index] += len(token)
        return logprobs

    def _name(self, token_id: int) -> str:
        """What a token is called in log-probabilities."""
        return f"token_id:{token_id}" if self._names_ids else self._token(token_id)


class ChatAnswer(Answer):
    """The answer of ``/v1/chat/completions``."""

    kind = "chatcmpl"
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Who speaks."""
        for index in range(len(self._texts)):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _message(self, index: int, text: _Text) -> dict[str, Any]:  # noqa: ARG002
        message = {"role": "assistant", "content": "".join(text.parts), "refusal": None}
        return {"message": message, "logprobs": self._logprobs(text.scores)}

    def _piece(self, index: int, text: str, scores: Sequence[TokenScore] | None) -> dict[str, Any]:  # noqa: ARG002
        return {"delta": {"content": text} if text or scores else {}, "logprobs": self._logprobs(scores)}

    def _logprobs(self, scores: Sequence[TokenScore] | None) -> dict[str, Any] | None:
        if scores is None or self._body.num_top is None:
            return None
        content = [
            self._logprob(score.token_id, score.logprob)
            | {"top_logprobs": [self._logprob(token_id, value) for token_id, value in score.top]}
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _logprob(self, token_id: int, value: float) -> dict[str, Any]:
        return {
            "token": self._token(token_id),
            "logprob": value,
            "bytes": token_bytes(self._version.tokenizer, token_id),
        }


def _large_source(body: CompletionRequest | ChatCompletionRequest, version: Version) -> dict[str, Any]:
    """What is to be said about a large model that is a service's; nothing about one that is here."""
    large = version.proxy.large
    if not is_remote(large) or body.model not in ("proxy", "large"):
        return {}
    hidden = "none"
    if hides_tokens(large):  # the untuned model is asked about texts of the proxy alone
        fills = body.model == "proxy" and large.fills(samples=body.temperature > 0)
        hidden = "filled" if fills else "restricted"
    return {"fedpt_large": {"shows": large.endpoint.shows, "hidden": hidden}}


def _packed(values: Tensor) -> dict[str, Any]:
    """Log-probabilities ``(positions, vocab)`` as few characters."""
    data = base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
    return {"positions": values.shape[0], "vocab_size": values.shape[1], "dtype": "float32", "data": data}


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
