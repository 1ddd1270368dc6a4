"""The service's log: one JSON object a line, on the error output. Answers are not in it, prompts only if asked for."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import sys
from collections.abc import Mapping
from typing import Any

_requests = logging.getLogger("fedpt_flwr.service.requests")


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)  # in ASCII: a path may hold what a terminal would obey


def set_up_logging(level: str = "INFO") -> None:
    """Let everything that this process logs be JSON lines on the error output."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    handler.addFilter(_is_no_cancellation)
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "transformers"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    # One line per request is written by the service itself, with what matters of it.
    logging.getLogger("uvicorn.access").disabled = True


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether this is more than a request that was ended with the service: a second Ctrl-C ends all at once."""
    if record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError):
        return False
    # Of the application's own end Starlette hands the traceback on as a text.
    return not record.getMessage().rstrip().endswith(f"{asyncio.CancelledError.__module__}.CancelledError")


def log_request(fields: Mapping[str, Any]) -> None:
    """Log a request that has ended."""
    _requests.info("request", extra={"fields": dict(fields)})


def log_event(message: str, *, warning: bool = False, **fields: Any) -> None:
    """Log something else that happened, such as a new version."""
    _requests.log(logging.WARNING if warning else logging.INFO, message, extra={"fields": fields})
