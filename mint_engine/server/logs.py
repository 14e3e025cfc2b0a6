"""Log lines that carry the id of the request they are about, as text or as JSON."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any, Literal

from mint_engine.server.context import current

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "request_id", "color_message"}


class RequestFilter(logging.Filter):
    """Adds `request_id` to every record made while a request is answered."""

    def filter(self, record: logging.LogRecord) -> bool:
        context = current()
        record.request_id = None if context is None else context.request_id
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request_id, what was given as `extra`, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": getattr(record, "request_id", None),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({key: value for key, value in line.items() if value is not None}, default=str)


class TextFormatter(logging.Formatter):
    """`2026-01-01T00:00:00.000Z info    mint_engine.server.app: text [request id]`."""

    def format(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", None)
        where = f" [{request_id}]" if request_id else ""
        message = _CONTROL.sub(_escaped, record.getMessage())  # a path may hold line ends, and forge a line
        text = f"{_time(record)} {record.levelname.lower():7} {record.name}: {message}{where}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def configure(format: Literal["text", "json"], level: str) -> None:
    """Send this package's and uvicorn's log lines to stderr. For a process of our own; who embeds us has their own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RequestFilter())
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    for name in ("mint_engine", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    logging.getLogger("uvicorn.access").disabled = True  # `middleware.py` writes those lines, with the request id
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, getattr(logging, level.upper())))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
