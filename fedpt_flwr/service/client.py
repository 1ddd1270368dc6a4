"""Asking a running service from Python, as ``fedpt generate --url`` does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from fedpt_flwr.errors import RunError

_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 600.0


class ServiceClient:
    """A running service.

    Args:
        url: Its address, with or without ``/v1``.
        api_key: Its key, if it asks for one.

    Raises:
        RunError: The address cannot be one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        with self._errors():
            if httpx.URL(self._url).scheme not in ("http", "https"):
                raise RunError(
                    "a service's address begins with http:// or https://",
                    value=url,
                    remedy="fedpt serve prints it when it is ready",
                )
            timeout = httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
            self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout)

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def info(self) -> dict[str, Any]:
        """What the service says of its run: ``run``, ``round``, ``max_tokens``, ``examples`` and so on.

        Raises:
            RunError: The service cannot be reached, or refuses.
        """
        with self._errors():
            response = self._http.get("/info")
            self._check(response)
            value = response.json()
        if not isinstance(value, dict) or "version" not in value:
            raise RunError("is no fedpt service", place=self._url, remedy="name the address that fedpt serve prints")
        return value

    def stream(self, body: Mapping[str, Any]) -> Iterator[str]:
        """Pieces of a completion's text, as they come.

        Args:
            body: What ``/v1/completions`` takes.

        Raises:
            RunError: The service cannot be reached, refuses, or fails in the middle.
        """
        with self._errors(), self._http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            if response.status_code >= 400:
                response.read()
                self._check(response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    error = event["error"]
                    message = error.get("message", error) if isinstance(error, dict) else error
                    raise RunError(str(message), place=self._url)
                for choice in event["choices"]:
                    yield choice["text"]

    def _check(self, response: httpx.Response) -> None:
        if response.status_code < 400:
            return
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"the service answers with status {response.status_code}"
        remedy = "give its key with --api-key or FEDPT_API_KEY" if response.status_code == 401 else None
        raise RunError(message, place=self._url, remedy=remedy)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"the service cannot be asked ({type(error).__name__}: {error})",
                place=self._url,
                remedy="is it running, and is this its address?",
            ) from error
