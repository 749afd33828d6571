"""What a log, a console or a file must not show."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

_HIDDEN = "***"
# Variables that hold a secret. Short values are words that stand elsewhere, too, but for MLflow's.
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|MYSQL_PWD|(^|_)(TOKEN|API_?KEY|ACCESS_KEY|ACCOUNT_KEY"
    r"|CONNECTION_STRING|SAS)$"
)
_PLACE_NAME = re.compile(r"_(FILE|PATH|DIR|URL|URI|NAME|ID)$")
_SHORTEST = 8
_MLFLOW = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

# A user and a password before a host. A password may hold "/", "?" and "#", and even a space, where
# what follows the colon is no port.
_USERS = (
    re.compile(r"(\w://)[^/\s]*@"),
    re.compile(r"(\w://)[^/\s@:?#]*:(?:(?!\w://)\S)*@"),
    re.compile(r"(\w://)[^/\s@:?#]*:(?!\d+(?:[\s/?#]|$))(?:(?!\w://)[^\n@])*@"),
)
_KEY = r"password|passwd|passphrase|pwd|secret|api[_-]?key|access[_-]?key|account[_-]?key"
_QUOTED = r"'(?:[^'\n]|'')*'|\"(?:[^\"\\\n]|\\.)*\""
# As in a query, a connection string, or one that was quoted.
_EQUAL = re.compile(
    rf"((?:{_KEY}|token|credential|signature|(?<![a-z])sig)(?:=|%3D))"
    rf"(?:{_QUOTED}|(?:(?!%3B|%26)[^&;\s#'\"])+)",
    re.IGNORECASE,
)
# As in YAML or JSON; "eos_token: </s>" is no secret. On a line of its own a value may have spaces.
_NAMED = rf"(?:{_KEY}|(?:access|auth|bearer|hf|refresh)[_-]token)"
_COLON = re.compile(
    rf"(^[ \t-]*[\w.-]*{_NAMED}: *(?!null\b)(?=[^\s'\"])).+$"
    rf"|({_NAMED}[\"']?: *(?!null\b))(?:{_QUOTED}|[^\s,'\"}}]+)",
    re.IGNORECASE | re.MULTILINE,
)


def without_credentials(text: str) -> str:
    """A text for eyes that need not see users, passwords and tokens.

    Hidden are the values of environment variables whose names say that they are secret, users and
    passwords in URIs, and what follows a name such as "password=" or "sig=".
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for pattern in _USERS:
        text = pattern.sub(rf"\1{_HIDDEN}@", text)
    text = _EQUAL.sub(rf"\1{_HIDDEN}", text)
    return _COLON.sub(rf'\1\2"{_HIDDEN}"', text)  # YAML takes a bare asterisk for an alias


def _secrets() -> set[str]:
    """The secrets that the environment holds, as they are and as in a URI."""
    found = {os.environ.get(name, "") for name in _MLFLOW}
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            found.add(value)
    return {form for value in found if value for form in (value, quote(value, safe=""))}
