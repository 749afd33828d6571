"""What a log, a console or a file must not show."""

from __future__ import annotations

import os
import re

_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


def without_credentials(text: str) -> str:
    """A text that may hold URLs, for eyes that need not see their users and passwords."""
    secrets = [os.environ.get(name) for name in _SECRETS]
    for secret in filter(None, secrets):
        text = text.replace(secret, "***")
    return re.sub(r"(\w://)[^/\s]*@", r"\1***@", text)
