"""TLS takes a certificate and its key, or neither."""

from __future__ import annotations

import pytest

from pager.config import load_config
from pager.errors import ConfigError

MODEL = {"model.path": "model"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": "tls.crt"}, r"router\.tls_cert is set and router\.tls_key is not"),
        ({"tls_key": "tls.key"}, r"router\.tls_key is set and router\.tls_cert is not"),
        ({"tls_client_ca": "ca.crt"}, r"set router\.tls_cert and router\.tls_key too"),
    ],
)
def test_half_of_tls_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=MODEL | {f"router.{key}": value for key, value in given.items()})


def test_both_halves_may_come_from_different_places() -> None:
    env = {"EXPERT_PAGER_ROUTER_TLS_CERT": "tls.crt"}
    router = load_config(env=env, overrides=MODEL | {"router.tls_key": "tls.key"}).router
    assert (router.tls_cert, router.tls_key, router.tls_client_ca) == ("tls.crt", "tls.key", None)
