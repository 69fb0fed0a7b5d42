"""Adapter name or alias -> a checked local folder.

In: the registry that `pipeline.publish` writes, a folder or a bucket. Out: `Version`s, and folders that an engine may
load. What must not be served is `Refused`, with the HTTP status, the OpenAI error code and the sentence a client gets.
"""

import hashlib
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from pipeline.base_model import BaseModel
from pipeline.publish import ALIAS, MANIFEST, RETRIEVAL
from pipeline.store import Folder

KEYS = "keys.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_VERSION = re.compile(r"[0-9a-f]{16}")
log = logging.getLogger("ray.serve")
_HARMLESS = {".safetensors", ".json", ".md"}


class Refused(Exception):
    """A request or an adapter that is turned away; crosses process borders whole."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    def __str__(self) -> str:
        return self.message


class Version(NamedTuple):
    """One immutable adapter."""

    name: str
    version: str

    @property
    def model_id(self) -> str:
        """What an OpenAI client calls it, and the engine too: a new version never meets an old one's prefix cache."""
        return f"{self.name}@{self.version}"


class Registry:
    """Reads go to the registry every time; whoever asks often keeps the answer for a while."""

    def __init__(self, uri: str) -> None:
        self.folder = Folder(uri)
        self._bases: dict[Version, str] = {}

    def live(self, base_revision: str | None = None) -> list[Version]:
        """Return the live version of every name that has one, or of those trained on a base model, sorted by name."""
        live = [Version(name, alias["version"]) for name, alias in self._live_aliases()]
        return live if base_revision is None else self._trained_on(base_revision, live)

    def pinned(self, base_revision: str) -> list[Version]:
        """Return the live versions of pinned names that were trained on a base model, sorted by name."""
        pinned = [Version(name, alias["version"]) for name, alias in self._live_aliases() if alias["pinned"]]
        return self._trained_on(base_revision, pinned)

    def _trained_on(self, base_revision: str, versions: list[Version]) -> list[Version]:
        with ThreadPoolExecutor(16) as pool:
            bases = list(pool.map(self._base_revision, versions))
        return [version for version, base in zip(versions, bases, strict=True) if base == base_revision]

    def _base_revision(self, version: Version) -> str | None:
        """Return that of the model that a version was trained on, which is kept; None if its manifest is broken."""
        if version not in self._bases:
            try:
                self._bases[version] = self.manifest(version)["base_revision"]
            except Refused:
                return None
        return self._bases[version]

    def _live_aliases(self) -> list[tuple[str, dict[str, Any]]]:
        found = [name for name in self.folder.folders() if _NAME.fullmatch(name)]
        with ThreadPoolExecutor(16) as pool:
            aliases = list(pool.map(self._alias_or_none, found))
        return [(name, alias) for name, alias in zip(found, aliases, strict=True) if alias and _is_live(alias)]

    def _alias_or_none(self, name: str) -> dict[str, Any] | None:
        """Return the alias; None if it is broken or leads elsewhere, so that one name does not hide the others."""
        try:
            return self.alias(name)
        except (Refused, ValueError) as error:
            log.warning("%s is left out: %s", name, error)
            return None

    def alias(self, name: str) -> dict[str, Any]:
        """Return {version, before, retired, pinned} of a name; version is None for an unknown one."""
        known = (self._below(name)).read_json(ALIAS) or {}
        return {"version": None, "before": [], "retired": [], "pinned": False} | known

    def versions(self, name: str) -> list[str]:
        """Return the complete versions of a name, retired ones included, oldest first."""
        folder = self._below(name)
        manifests = {v: (folder / v).read_json(MANIFEST) for v in folder.folders() if _VERSION.fullmatch(v)}
        return sorted((v for v, m in manifests.items() if m), key=lambda version: manifests[version]["created"])

    def resolve(self, model: str) -> Version:
        """Turn `name` (its live version) or `name@version` into a version; Refused with 404 if there is none."""
        name, at, version = model.partition("@")
        unknown = Refused(404, "model_not_found", f"The model {model[:200]!r} does not exist.")
        if not _NAME.fullmatch(name) or (at and not _VERSION.fullmatch(version)):
            raise unknown
        alias = self.alias(name)
        if not at and not _is_live(alias):
            raise unknown
        chosen = Version(name, version if at else alias["version"])
        if chosen.version in alias["retired"]:
            raise Refused(410, "model_retired", f"The model {chosen.model_id!r} was retired.")
        if at and (self._below(name) / version).read_json(MANIFEST) is None:
            raise unknown
        return chosen

    def manifest(self, version: Version) -> dict[str, Any]:
        """Return the manifest of a version; Refused if it is missing or belongs to another name."""
        try:
            manifest = (self._below(version.name) / version.version).read_json(MANIFEST)
        except ValueError:
            manifest = None
        if not manifest or (manifest.get("name"), manifest.get("version")) != tuple(version):
            raise _bad(version, "its manifest is missing or broken")
        return manifest

    def fetch_adapter(self, version: Version, target: Path, base: BaseModel, max_rank: int, max_bytes: int) -> dict:
        """Copy the PEFT files to a folder after checking everything that can be checked, and return the manifest.

        Raises Refused with 409 for another base model, tokenizer or chat template, too large a rank or size, a file
        that is missing, changed or of a kind that could run code, and weights that do not fit their config.
        """
        manifest = self.manifest(version)
        for field, wanted in (
            ("base_revision", base.revision),
            ("tokenizer_digest", base.tokenizer_digest),
            ("chat_template_digest", base.chat_template_digest),
        ):
            if manifest[field] != wanted:
                raise _bad(version, f"it was trained on another base model ({manifest['base_model']}: {field} differs)")
        if manifest["rank"] > max_rank:
            raise _bad(version, f"its rank is {manifest['rank']}, and serve.max_rank is {max_rank}")
        source = self._below(version.name) / version.version
        strange = [name for name in source.list() if Path(name).suffix not in _HARMLESS]
        if strange:
            raise _bad(version, f"it holds {strange[0]!r}, and only safetensors and JSON are loaded")
        self._copy(version, manifest["files"], {WEIGHTS, PEFT_CONFIG}, target, max_bytes)
        _check_weights(version, target, manifest)
        return manifest

    def fetch_retrieval(self, version: Version, target: Path, max_bytes: int, only: set[str] | None = None) -> None:
        """Copy the passages and their index, or `only` some of these files; Refused with 409 if there are none."""
        prefix = f"{RETRIEVAL}/"
        digests = self.manifest(version)["files"]
        found = [name for name in digests if name.startswith(prefix)]
        wanted = {name for name in found if only is None or name.removeprefix(prefix) in only}
        if not wanted:
            raise _bad(version, "it was published without its passages")
        self._copy(version, digests, wanted, target, max_bytes)

    def _copy(self, version: Version, digests: dict[str, str], names: set[str], target: Path, max_bytes: int) -> None:
        source = self._below(version.name) / version.version
        target.mkdir(parents=True, exist_ok=True)
        room = max_bytes
        for name in sorted(names):
            folder, _, file = name.rpartition("/")
            origin = source / folder if folder else source
            try:
                room -= origin.size(file)
                if room < 0:
                    raise _bad(version, f"it is larger than {max_bytes >> 20} MiB")
                data = origin.read_bytes(file)
            except FileNotFoundError:
                raise _bad(version, f"{name} is missing") from None
            if hashlib.sha256(data).hexdigest() != digests.get(name):
                raise _bad(version, f"{name} is not what was published: its digest differs")
            Folder(str(target)).write_bytes(file, data)  # whole: another load may be reading it

    def _below(self, name: str) -> Folder:
        """Return the folder of a name; one that leads out of the registry through a symlink counts as unknown."""
        folder = self.folder / name
        if "://" not in folder.uri:
            inside = Path(self.folder.uri).resolve()
            if not Path(folder.uri).resolve().is_relative_to(inside):
                raise Refused(404, "model_not_found", f"The model {name!r} does not exist.")
        return folder


def _is_live(alias: dict[str, Any]) -> bool:
    return alias["version"] is not None and alias["version"] not in alias["retired"]


def _bad(version: Version, why: str) -> Refused:
    return Refused(409, "adapter_refused", f"The adapter {version.model_id!r} cannot be served: {why}.")


def _check_weights(version: Version, folder: Path, manifest: dict[str, Any]) -> None:
    try:
        config = json.loads((folder / PEFT_CONFIG).read_bytes())
        plain = (config["r"], config["peft_type"]) == (manifest["rank"], "LORA") and not (
            config.get("use_dora") or config.get("modules_to_save") or config.get("bias", "none") != "none"
        )
        if not plain or sorted(config["target_modules"]) != manifest["target_modules"]:
            raise _bad(version, f"{PEFT_CONFIG} is no plain LoRA of the rank and modules in its manifest")
        with safe_open(folder / WEIGHTS, framework="numpy") as weights:
            for key in weights.keys():  # noqa: SIM118 (no mapping)
                shape = weights.get_slice(key).get_shape()
                rank = shape[0] if ".lora_A." in key else shape[1] if ".lora_B." in key else None
                if rank != config["r"] or key.split(".")[-3] not in manifest["target_modules"]:
                    raise _bad(version, f"{WEIGHTS} holds {key!r} of shape {shape}, which its config does not explain")
    except (SafetensorError, ValueError, KeyError, IndexError) as error:
        raise _bad(version, f"its files are broken ({type(error).__name__})") from None
