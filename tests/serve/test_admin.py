"""The admin commands, as a person types them: what they print, what they change, what they refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.publish import write_version
from serve.access import identify, read_keys
from serve.admin import main
from serve.registry import Refused, Registry
from tests.serve.test_registry import BASE, folder_of


@pytest.fixture
def config(registry: Registry, tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(
        f"""
        run_dir = "{tmp_path}/run"
        [model]
        path = "{tmp_path}/model"
        [read]
        paths = ["nothing"]
        [publish]
        registry = "{registry.folder.uri}"
        name = "test"
        """
    )
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith("error: ")
    return captured.err


def test_a_version_comes_goes_and_is_retired(
    config: str,
    registry: Registry,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = registry.resolve("ada")
    contents = {name: (folder_of(registry, old) / name).read_bytes() for name in ("adapter_config.json",)}
    write_version(registry.folder / "ada", "0" * 16, BASE, contents, probe=None)
    assert {version["version"] for version in run(capsys, config, "list")["ada"]["versions"]} == {old.version, "0" * 16}
    assert "has meant no other version" in fail(capsys, config, "rollback", "ada")
    assert run(capsys, config, "alias", f"ada@{'0' * 16}")["version"] == "0" * 16
    assert registry.resolve("ada").version == "0" * 16
    assert "move the alias first" in fail(capsys, config, "retire", f"ada@{'0' * 16}")
    assert run(capsys, config, "rollback", "ada")["version"] == old.version
    assert run(capsys, config, "pin", "ada")["pinned"] is True
    assert run(capsys, config, "unpin", "ada")["pinned"] is False
    assert run(capsys, config, "retire", f"ada@{'0' * 16}")["retired"] == ["0" * 16]
    with pytest.raises(Refused):
        registry.resolve(f"ada@{'0' * 16}")
    assert "was retired" in fail(capsys, config, "alias", f"ada@{'0' * 16}")
    assert "exact version" in fail(capsys, config, "alias", "ada")
    assert "does not exist" in fail(capsys, config, "pin", "nobody")


def test_rollbacks_go_further_back_each_time(
    config: str,
    registry: Registry,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = registry.resolve("ada")
    contents = {"adapter_config.json": (folder_of(registry, first) / "adapter_config.json").read_bytes()}
    second, third = "2" * 16, "3" * 16
    for version in (second, third):
        write_version(registry.folder / "ada", version, BASE, contents, probe=None)
        run(capsys, config, "alias", f"ada@{version}")
    assert [run(capsys, config, "rollback", "ada")["version"] for _ in range(3)] == [second, first.version, third]
    run(capsys, config, "retire", f"ada@{second}")
    assert run(capsys, config, "rollback", "ada")["version"] == first.version, "a retired one is passed over"


def test_a_key_is_shown_once(
    config: str,
    registry: Registry,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(capsys, config, "keys") == []
    made = run(capsys, config, "key", "ada", "bob")
    assert identify(read_keys(registry.folder), f"Bearer {made['key']}").adapters == {"ada", "bob"}
    (listed,) = run(capsys, config, "keys")
    assert listed["id"] == made["id"] and made["key"] not in json.dumps(listed)
    assert run(capsys, config, "revoke", made["id"]) == {"revoked": made["id"]}
    assert "no key" in fail(capsys, config, "revoke", made["id"])
