"""API keys: who is let in, and what the registry keeps of a key."""

import hashlib
from pathlib import Path

import pytest

from pipeline.store import Folder
from serve.access import ANYONE, add_key, identify, read_keys, remove_key
from serve.registry import Refused


def test_without_keys_everyone_is_served(tmp_path: Path) -> None:
    assert identify(read_keys(Folder(str(tmp_path))), None) == ANYONE


def test_a_key_opens_its_adapters_only(tmp_path: Path) -> None:
    registry = Folder(str(tmp_path))
    key_id, secret = add_key(registry, ["handbook"])
    _, master = add_key(registry, ["*"])
    caller = identify(read_keys(registry), f"Bearer {secret}")
    assert caller.id == key_id
    assert caller.may_use("handbook")
    assert not caller.may_use("payroll")
    assert identify(read_keys(registry), f"bearer {master}").may_use("payroll")


def test_keys_are_stored_as_digests(tmp_path: Path) -> None:
    _, secret = add_key(Folder(str(tmp_path)), ["*"])
    stored = (tmp_path / "keys.json").read_text()
    assert secret not in stored
    assert hashlib.sha256(secret.encode()).hexdigest() in stored


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic {secret}", "{secret}"])
def test_anything_else_is_401(tmp_path: Path, header: str | None) -> None:
    registry = Folder(str(tmp_path))
    _, secret = add_key(registry, ["*"])
    with pytest.raises(Refused) as refused:
        identify(read_keys(registry), header and header.format(secret=secret))
    assert refused.value.status == 401


def test_a_revoked_key_is_401_and_the_last_one_does_not_open_the_door(tmp_path: Path) -> None:
    registry = Folder(str(tmp_path))
    key_id, secret = add_key(registry, ["*"])
    remove_key(registry, key_id)
    with pytest.raises(Refused):
        identify(read_keys(registry), f"Bearer {secret}")
    with pytest.raises(ValueError, match=f"no key '{key_id}'"):
        remove_key(registry, key_id)
