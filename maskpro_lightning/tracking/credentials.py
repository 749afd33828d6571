"""Removes users, passwords and tokens from texts before they are logged, printed or written."""

from __future__ import annotations

import os
import re
from urllib.parse import quote

_HIDDEN = "***"
# Environment variables that hold a secret. Short values may be common words, so they are not
# replaced, except MLflow's.
_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|SECRET|MYSQL_PWD|(^|_)(TOKEN|API_?KEY|ACCESS_KEY|ACCOUNT_KEY"
    r"|CONNECTION_STRING|SAS)$"
)
_PLACE_NAME = re.compile(r"_(FILE|PATH|DIR|URL|URI|NAME|ID)$")
_SHORTEST = 8
_MLFLOW = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")

# A user and a password before a host. A password may hold "/", "?" and "#"; also a space, if what
# follows the colon is no port.
_USERS = (
    re.compile(r"(\w://)[^/\s]*@"),
    re.compile(r"(\w://)[^/\s@:?#]*:(?:(?!\w://)\S)*@"),
    re.compile(r"(\w://)[^/\s@:?#]*:(?!\d+(?:[\s/?#]|$))(?:(?!\w://)[^\n@])*@"),
)
_KEY = r"password|passwd|passphrase|pwd|secret|api[_-]?key|access[_-]?key|account[_-]?key"
_QUOTED = r"'(?:[^'\n]|'')*'|\"(?:[^\"\\\n]|\\.)*\""
# name=value, as in a query or a connection string; also percent-encoded.
_EQUAL = re.compile(
    rf"((?:{_KEY}|token|credential|signature|(?<![a-z])sig)(?:=|%3D))"
    rf"(?:{_QUOTED}|(?:(?!%3B|%26)[^&;\s#'\"])+)",
    re.IGNORECASE,
)
# name: value, as in YAML or JSON; "eos_token: </s>" is no secret. On a line of its own a value may
# have spaces.
_NAMED = rf"(?:{_KEY}|(?:access|auth|bearer|hf|refresh)[_-]token)"
_COLON = re.compile(
    rf"(^[ \t-]*[\w.-]*{_NAMED}: *(?!null\b)(?=[^\s'\"])).+$"
    rf"|({_NAMED}[\"']?: *(?!null\b))(?:{_QUOTED}|[^\s,'\"}}]+)",
    re.IGNORECASE | re.MULTILINE,
)


def without_credentials(text: str) -> str:
    """A text in which users, passwords and tokens are replaced by "***".

    These are the values of environment variables with names of secrets, users and passwords in
    URIs, and what follows a name such as "password=" or "sig=".
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    for pattern in _USERS:
        text = pattern.sub(rf"\1{_HIDDEN}@", text)
    text = _EQUAL.sub(rf"\1{_HIDDEN}", text)
    return _COLON.sub(rf'\1\2"{_HIDDEN}"', text)  # YAML takes a bare asterisk for an alias


def _secrets() -> set[str]:
    """The secrets in the environment, as they are and percent-encoded."""
    found = {os.environ.get(name, "") for name in _MLFLOW}
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name) and not _PLACE_NAME.search(name):
            found.add(value)
    return {form for value in found if value for form in (value, quote(value, safe=""))}
