"""Secrets out of what is shown and kept: a message of some library may carry one, such as a proxy's password.

Owns what counts as a secret: the value of an environment variable with such a name, and user:password in a URL. Nothing of
ours writes the environment down; this is for text that others made.

    log.error("%s", redacted(str(error)))
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

# Words may run together (SSHPASS, APIKEY), but TOKENIZERS_PARALLELISM, MAX_TOKENS, GIT_AUTHOR_NAME and PATH are none.
_SECRET_NAME = re.compile(r"PASS|(^|_)PAT(_|$)|(KEYS?|TOKEN|SECRETS?|PWD|CREDENTIALS?|AUTH)(_|$)", re.IGNORECASE)
_USER_IN_URL = re.compile(r"(?<=://)[^/\s@]+:[^/\s@]*(?=@)")
_SHORTEST = 8  # characters; shorter values would also be found in ordinary words


def redacted(text: str) -> str:
    """The text with *** for every secret."""
    text = _USER_IN_URL.sub("***", text)
    # Longest first: one may begin as another does. A value with a slash at its head is the path of a secret, not one.
    values = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and not value.startswith("/")}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = text.replace(value, "***")
    return text


def redacted_in(value: Any) -> Any:
    """The same of every string in what will be JSON."""
    if isinstance(value, dict):
        return {name: redacted_in(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_in(item) for item in value]
    return value if isinstance(value, bool | int | float | None) else redacted(str(value))


def redact_record(record: logging.LogRecord) -> bool:
    """A filter of a logger: its lines, tracebacks too, are written redacted."""
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + logging.Formatter().formatException(record.exc_info)
    record.msg, record.args, record.exc_info, record.exc_text = redacted(text), (), None, None
    return True
