"""Laws of secrets: none is shown, however it stands in a URI, a file of settings or a variable."""

from __future__ import annotations

import json

import pytest
import yaml

from maskpro_lightning.tracking.credentials import without_credentials

S = "s3cr3t"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql://me:{S}/x@host/db", "postgresql://***@host/db"),
        (f"postgresql://me:a/{S}@host:5432/db", "postgresql://***@host:5432/db"),
        (f"https://me:{S}?x@host", "https://***@host"),
        (f"https://me:{S}#x@host", "https://***@host"),
        (f"https://me:{S}%40x@host", "https://***@host"),
        (f"mysql+pymysql://me:pa {S}@host/db", "mysql+pymysql://***@host/db"),
        (f"postgresql://host/db?user=me&password={S}", "postgresql://host/db?user=me&password=***"),
        (f"https://host/?token={S}&page=2", "https://host/?token=***&page=2"),
        (f"https://host/api?sv=1&sig={S}", "https://host/api?sv=1&sig=***"),
        (f"https://host/?X-Amz-Signature={S}", "https://host/?X-Amz-Signature=***"),
        (f"///?odbc_connect=UID%3Dme%3BPWD%3D{S}%3B", "///?odbc_connect=UID%3Dme%3BPWD%3D***%3B"),
        (f"host=h password='a {S}' user=me", "host=h password=*** user=me"),
        ("http://host:5000 by me@host", "http://host:5000 by me@host"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("eos_token: </s>, tokenizer: a, config=b", "eos_token: </s>, tokenizer: a, config=b"),
    ],
)
def test_a_secret_in_a_uri_is_not_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@pytest.mark.parametrize("value", [S, f"two {S}", f"it's {S}"])
def test_settings_without_secrets_are_settings_still(value: str) -> None:
    settings = {"a": {"api_key": value, "password": None}, "hf_token": value, "last": "x"}
    expected = {"a": {"api_key": "***", "password": None}, "hf_token": "***", "last": "x"}
    assert json.loads(without_credentials(json.dumps(settings))) == expected
    assert yaml.safe_load(without_credentials(yaml.safe_dump(settings))) == expected


def test_what_the_environment_calls_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"):
        monkeypatch.setenv(name, f"{name.lower()} of/mine")
        assert without_credentials(f"x {name.lower()} of/mine y") == "x *** y"
        assert without_credentials(f"x {name.lower()}%20of%2Fmine y") == "x *** y"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("MY_TOKEN", "short")
    assert without_credentials("sometimes short") == "sometimes short"
