"""What the registry hands out and what it refuses: names, versions, aliases, and files that must not be loaded."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from pipeline.base_model import load_base_model
from pipeline.publish import move_alias, write_version
from pipeline.schema import Probe
from pipeline.store import Folder
from serve.registry import Refused, Registry, Version
from tests.serve.conftest import MODEL, NAMES

BASE = load_base_model(str(MODEL))


def folder_of(registry: Registry, version: Version) -> Path:
    return Path(registry.folder.uri, version.name, version.version)


def fetch(registry: Registry, version: Version, target: Path, max_rank: int = 64, max_bytes: int = 1 << 30) -> None:
    registry.fetch_adapter(version, target, BASE, max_rank, max_bytes)


def rewrite_manifest(registry: Registry, version: Version, **changes: object) -> None:
    path = folder_of(registry, version) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_names_and_versions(registry: Registry) -> None:
    assert [version.name for version in registry.live()] == NAMES
    live = registry.resolve("ada")
    assert registry.resolve(live.model_id) == live
    assert registry.versions("ada") == [live.version]


@pytest.mark.parametrize(
    "model",
    ["nobody", "", "ada@", "ada@0000000000000000", "ada@../bob", "../ada", "/etc", "a/b", "Ada", "ada\u200b",
     "\uff41da", "ada ", "ada\n", ".", "..", "a" * 65, "ada@" + "0" * 15 + "\u0660"],
)  # fmt: skip
def test_unknown_names_are_404(registry: Registry, model: str) -> None:
    with pytest.raises(Refused) as refused:
        registry.resolve(model)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_a_symlink_out_of_the_registry_is_unknown(registry: Registry, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(Path(registry.folder.uri, "bob"), outside)
    os.symlink(outside, Path(registry.folder.uri, "bob"))
    with pytest.raises(Refused) as refused:
        registry.resolve("bob")
    assert refused.value.status == 404


def test_a_broken_name_does_not_hide_the_others(registry: Registry, tmp_path: Path) -> None:
    live = registry.live()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(registry.folder.uri, "outside").symlink_to(elsewhere)
    Path(registry.folder.uri, "torn").mkdir()
    Path(registry.folder.uri, "torn", "live.json").write_text("{")
    assert live and registry.live() == live


def test_adapters_of_another_base_model_are_not_offered(registry: Registry) -> None:
    rewrite_manifest(registry, registry.resolve("bob"), base_revision="0" * 32)
    (folder_of(registry, registry.resolve("cleo")) / "manifest.json").write_text("{")
    assert [version.name for version in registry.live(BASE.revision)] == [n for n in NAMES if n not in ("bob", "cleo")]
    assert [version.name for version in registry.live("0" * 32)] == ["bob"]
    for name in ("ada", "bob"):
        alias = Path(registry.folder.uri, name, "live.json")
        alias.write_text(json.dumps(json.loads(alias.read_text()) | {"pinned": True}))
    assert [version.name for version in registry.pinned(BASE.revision)] == ["ada"]
    assert [version.name for version in registry.live()] == NAMES


def test_alias_rollback_and_retire(registry: Registry) -> None:
    old = registry.resolve("ada")
    contents = {
        name: (folder_of(registry, registry.resolve("bob")) / name).read_bytes()
        for name in ("adapter_model.safetensors", "adapter_config.json")
    }
    new = Version("ada", "0123456789abcdef")
    write_version(registry.folder / "ada", new.version, BASE, contents, probe=None)
    assert registry.resolve("ada") == old, "a new version is not live before its alias moves"
    move_alias(registry.folder / "ada", new.version)
    assert registry.resolve("ada") == new
    assert registry.alias("ada")["before"] == [old.version]
    alias = registry.alias("ada") | {"retired": [old.version]}
    (registry.folder / "ada").write_json("live.json", alias)
    with pytest.raises(Refused) as refused:
        registry.resolve(old.model_id)
    assert refused.value.status == 410
    assert set(registry.versions("ada")) == {old.version, new.version}


def test_a_good_adapter_is_copied_whole(registry: Registry, tmp_path: Path) -> None:
    version = registry.resolve("ada")
    fetch(registry, version, tmp_path / "copy")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder_of(registry, version) / name).read_bytes()


def test_bad_adapters_are_refused(registry: Registry, tmp_path: Path) -> None:
    weights = "adapter_model.safetensors"

    def refuse(name: str, why: str, **limits: int) -> None:
        with pytest.raises(Refused, match=why) as refused:
            fetch(registry, registry.resolve(name), tmp_path / name, **limits)
        assert (refused.value.status, refused.value.code) == (409, "adapter_refused")

    refuse("ada", "rank is 8, and serve.max_rank is 4", max_rank=4)
    refuse("ada", "larger than 0 MiB", max_bytes=1000)
    rewrite_manifest(registry, registry.resolve("ada"), base_revision="0" * 32)
    refuse("ada", "another base model")
    rewrite_manifest(registry, registry.resolve("bob"), chat_template_digest="0" * 32)
    refuse("bob", "chat_template_digest differs")
    damaged = folder_of(registry, registry.resolve("cleo")) / weights
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    refuse("cleo", "its digest differs")
    (folder_of(registry, registry.resolve("dora")) / weights).unlink()
    refuse("dora", f"{weights} is missing")
    (folder_of(registry, registry.resolve("emil")) / "adapter_model.bin").write_bytes(pickle.dumps({}))
    refuse("emil", "'adapter_model.bin', and only safetensors")
    (folder_of(registry, registry.resolve("fay")) / "manifest.json").write_text("{")
    with pytest.raises(Refused, match="manifest is missing or broken"):
        fetch(registry, registry.resolve("fay"), tmp_path / "fay")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"r": 16}, "no plain LoRA"),
        ({"use_dora": True}, "no plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "no plain LoRA"),
        ({"target_modules": ["q_proj"]}, "no plain LoRA"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(registry: Registry, tmp_path: Path, change: dict, why: str) -> None:
    live = folder_of(registry, registry.resolve("ada"))
    manifest = json.loads((live / "manifest.json").read_text())
    config = json.loads((live / "adapter_config.json").read_text()) | change
    contents = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (live / "adapter_model.safetensors").read_bytes(),
    }
    version = Version("ada", "f" * 16)
    write_version(registry.folder / "ada", version.version, BASE, contents, probe=None)
    rewrite_manifest(registry, version, rank=8, target_modules=manifest["target_modules"])
    with pytest.raises(Refused, match=why):
        fetch(registry, version, tmp_path / "copy")


def test_weights_that_do_not_fit_their_config_are_refused(registry: Registry, tmp_path: Path) -> None:
    live = folder_of(registry, registry.resolve("ada"))
    config = json.loads((live / "adapter_config.json").read_text()) | {"r": 4}
    contents = {
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": (live / "adapter_model.safetensors").read_bytes(),
    }
    version = Version("ada", "e" * 16)
    write_version(registry.folder / "ada", version.version, BASE, contents, probe=Probe("?", [1], [2]))
    with pytest.raises(Refused, match="which its config does not explain"):
        fetch(registry, version, tmp_path / "copy")


def test_the_registry_works_in_a_bucket(registry: Registry, bucket: Folder, tmp_path: Path) -> None:
    remote = Registry((bucket / "registry").uri)
    version = registry.resolve("ada")
    live = folder_of(registry, version)
    for file in live.iterdir():
        (remote.folder / "ada" / version.version).write_bytes(file.name, file.read_bytes())
    move_alias(remote.folder / "ada", version.version)
    assert remote.live() == [version]
    assert remote.resolve("ada") == version
    fetch(remote, version, tmp_path / "copy")
    assert "secret" not in str(remote.folder)


def test_refusals_cross_process_borders() -> None:
    refused = pickle.loads(pickle.dumps(Refused(404, "model_not_found", "no such model")))
    assert (refused.status, refused.code, str(refused)) == (404, "model_not_found", "no such model")
