"""Authorization header -> who is asking, and which adapters that key may use.

In: `keys.json` of the registry, where keys stand as SHA-256 only. Out: `Caller`, or `Refused` with 401. A key is 256
random bits, so a plain digest cannot be guessed back. A registry without the file serves everyone.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.store import Folder
from serve.registry import KEYS, Refused

EVERY = "*"


@dataclass(frozen=True)
class Caller:
    """A key's public id and the adapter names that it may use."""

    id: str
    adapters: frozenset[str]

    def may_use(self, name: str) -> bool:
        return EVERY in self.adapters or name in self.adapters


ANYONE = Caller("anyone", frozenset({EVERY}))


def read_keys(registry: Folder) -> list[dict[str, Any]] | None:
    """Return the keys, or None where none were ever made and everyone is served."""
    stored = registry.read_json(KEYS)
    return None if stored is None else stored["keys"]


def identify(keys: list[dict[str, Any]] | None, authorization: str | None) -> Caller:
    """Return the caller; Refused with 401 if the header holds no known key."""
    if keys is None:
        return ANYONE
    scheme, _, secret = (authorization or "").partition(" ")
    given = _digest(secret.strip())
    for key in keys:
        if scheme.lower() == "bearer" and hmac.compare_digest(key["sha256"], given):
            return Caller(key["id"], frozenset(key["adapters"]))
    raise Refused(401, "invalid_api_key", "Missing or unknown API key; send it as 'Authorization: Bearer KEY'.")


def add_key(registry: Folder, adapters: list[str]) -> tuple[str, str]:
    """Make a key for these adapters ("*": all); return its id and the secret, which is stored nowhere."""
    secret = f"cd-{secrets.token_urlsafe(32)}"
    key = {
        "id": f"key-{secrets.token_hex(4)}",
        "sha256": _digest(secret),
        "adapters": sorted(adapters),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    registry.write_json(KEYS, {"keys": [*(read_keys(registry) or []), key]})
    return key["id"], secret


def remove_key(registry: Folder, key_id: str) -> None:
    """Forget a key; ValueError if there is none with this id. Without any key left, nobody is served."""
    keys = read_keys(registry) or []
    kept = [key for key in keys if key["id"] != key_id]
    if len(kept) == len(keys):
        raise ValueError(f"no key {key_id!r} in {registry}; list them with: keys")
    registry.write_json(KEYS, {"keys": kept})


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
