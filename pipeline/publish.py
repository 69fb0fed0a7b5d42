"""Adapter + scores -> an immutable version in the registry, and the alias that points at it.

In: the complete train and evaluate stages, and the corpus's passages. Out:

    REGISTRY/<name>/<version>/               PEFT safetensors and config
    REGISTRY/<name>/<version>/retrieval/     the passages and their BM25 index
    REGISTRY/<name>/<version>/manifest.json  what it is and the digest of every file; written last
    REGISTRY/<name>/live.json                the alias: which version `name` means, and which it meant before

A version is named by its content, so a name never gets a second content; publishing it again can only change what its
manifest says of its evaluation.
"""

import getpass
import hashlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.base_model import BaseModel
from pipeline.config import Config, Gate
from pipeline.previous import adapter_of
from pipeline.schema import AdapterManifest, Probe, digest
from pipeline.store import Folder, Stage, require_line

ALIAS = "live.json"
MANIFEST = "manifest.json"
RETRIEVAL = "retrieval"


def publish_adapter(config: Config, base: BaseModel, force: str | None = None) -> dict[str, Any]:
    """Publish and point the alias `live` at the version; return the manifest with `uri` added.

    A version that the alias meant before stays where it is: what was rolled back does not come back by itself.
    Raises ValueError if the adapter is below a threshold of `publish.gate`, unless `force` says why it is to be
    published all the same; who forced it, why and past what then stands in the manifest.
    """
    line = require_line(config.run_dir, "evaluate")
    trained, evaluated = line["train"], line["evaluate"]
    failed = _objections(config, base, trained, evaluated)
    if failed and force is None:
        raise ValueError(
            f"the adapter {config.publish.name} is not published: {'; '.join(failed)}. See "
            f"{Folder(config.run_dir)}/report.html; mend it, change publish.gate, or pass --force REASON"
        )
    adapters = Folder(config.publish.registry) / config.publish.name
    version = version_of_run(config, base)
    alias = adapters.read_json(ALIAS) or {}
    if version in alias.get("retired", []):
        raise ValueError(
            f"{config.publish.name}@{version} was retired and does not come back; publish it under another "
            "publish.name, or change what it is made of"
        )
    manifest = (adapters / version).read_json(MANIFEST)
    measured = {"scores": evaluated.get("scores", {}), "metric": evaluated.get("metric", "substring_match")}
    forced = {"by": _user(), "reason": force or "", "past": failed} if failed else {}
    if manifest is None:
        print(f"publish: {config.publish.name}@{version}: indexing its passages", file=sys.stderr)
        manifest = write_version(
            adapters,
            version,
            base,
            _adapter_files(config) | _index_files(config.run_dir),
            probe=Probe(**evaluated["probe"]),
            run_id=trained["data_digest"],
            data_digest=trained["settings"]["input"],
            measured=measured,
            forced=forced,
        )
    elif (now := manifest | measured | ({"forced": forced} if forced else {})) != manifest:
        manifest = now  # the same adapter was evaluated anew, or forced
        (adapters / version).write_json(MANIFEST, manifest)
    if manifest["rank"] > config.serve.max_rank:
        print(
            f"publish: its rank is {manifest['rank']}, and an endpoint with serve.max_rank = {config.serve.max_rank} "
            "will refuse it; raise that",
            file=sys.stderr,
        )
    if version in alias.get("before", []):
        print(
            f"publish: {config.publish.name} goes on meaning {alias['version']}, not {version}, which it meant before; "
            f"to move it: python -m serve.admin CONFIG alias {config.publish.name}@{version}",
            file=sys.stderr,
        )
    else:
        move_alias(adapters, version)
    return manifest | {"uri": str(adapters / version)}


def _objections(config: Config, base: BaseModel, trained: dict[str, Any], evaluated: dict[str, Any]) -> list[str]:
    """Return what speaks against publishing: the gate, and a comparison with what clients no longer have."""
    failed = check_gate(evaluated, config.publish.gate)
    previous = previous_version(config, base, trained["data_digest"])
    was, now = evaluated["settings"].get("previous"), previous and previous.name
    if config.publish.gate.max_previous_loss is not None and was != now:
        failed.append(
            f"it was compared with {was or 'no earlier version'}, and clients have {now or 'none'} now: evaluate it "
            "again, with --redo"
        )
    return failed


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, whose user has no name
        return f"uid {os.getuid()}"


def check_gate(evaluated: dict[str, Any], gate: Gate) -> list[str]:
    """Return what an adapter's evaluation falls short of, one sentence for each threshold."""
    lost = evaluated.get("lost", {})
    falls = {
        name: lost[name]["closed_book"] - lost[name]["adapter"] if name in lost else None
        for name in ("general_questions", "refusal")
    }
    failed = []
    behind = {(row["arm"], row["over"]): -row["difference"] for row in evaluated.get("comparisons", [])}
    retrieval, previous = behind.get(("adapter_retrieval", "retrieval")), behind.get(("adapter", "previous"))
    closed = evaluated.get("gap_closed")
    alone = behind.get(("adapter", "closed_book")) if closed is None else None
    # Negated, so that a NaN meets no threshold.
    if gate.min_gap_closed is not None and closed is not None and not closed >= gate.min_gap_closed:
        failed.append(
            f"it closes {closed:.2f} of the gap, {gate.min_gap_closed - closed:.2f} less than min_gap_closed = "
            f"{gate.min_gap_closed}"
        )
    for name, what, value, most in (
        ("max_closed_book_loss", "its fall below the base model alone", alone, gate.max_closed_book_loss),
        ("max_kl_to_base", "its KL to the base model on general prompts", lost.get("kl_to_base"), gate.max_kl_to_base),
        ("max_general_loss", "its fall on general questions", falls["general_questions"], gate.max_general_loss),
        ("max_refusal_loss", "its fall in refusals", falls["refusal"], gate.max_refusal_loss),
        ("max_retrieval_loss", "its fall below the base model with retrieval", retrieval, gate.max_retrieval_loss),
        ("max_previous_loss", "its fall below the version that clients have", previous, gate.max_previous_loss),
    ):
        if most is not None and value is not None and not value <= most:
            failed.append(f"{what} is {value:.2f}, {value - most:.2f} more than {name} = {most}")
    return failed


def previous_version(config: Config, base: BaseModel, run_id: str) -> Folder | None:
    """Return the version that clients have, if it is of this base model, to compare the run's adapter with.

    A run whose adapter was published already stays compared with what its evaluation was begun with.
    """
    adapters = Folder(config.publish.registry) / config.publish.name
    alias = adapters.read_json(ALIAS) or {}
    known = filter(None, (alias.get("version"), *alias.get("before", [])))
    manifests = {version: (adapters / version).read_json(MANIFEST) or {} for version in known}
    version = alias.get("version")
    if run_id in (manifest.get("run_id") for manifest in manifests.values()):
        begun = (Folder(config.run_dir) / "evaluate").read_json("settings.json")
        version = (begun or {}).get("previous")
    is_ours = version in manifests and manifests[version].get("base_revision") == base.revision
    return adapters / version if version and is_ours else None


def version_of_run(config: Config, base: BaseModel) -> str:
    """Return the version that a run's adapter is, or will be, published as."""
    # The documents' too: it is under their names that clients are told the sources.
    passages = digest(*(Stage(config.run_dir, name).require()["data_digest"] for name in ("dedup", "chunk")))
    return name_version(base, _adapter_files(config), passages)


def _adapter_files(config: Config) -> dict[str, bytes]:
    source = adapter_of(config.run_dir)
    return {name: source.read_bytes(name) for name in source.list()}


def name_version(base: BaseModel, contents: dict[str, bytes], passages_digest: str) -> str:
    """Return the version that an adapter's files, its base model and its passages make."""
    parts = [part for name in sorted(contents) for part in (name, contents[name])]
    return digest(base.revision, passages_digest, *parts)[:16]


def write_version(
    adapters: Folder,
    version: str,
    base: BaseModel,
    contents: dict[str, bytes],
    *,
    probe: Probe | None,
    run_id: str = "",
    data_digest: str = "",
    measured: dict[str, Any] | None = None,
    forced: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a version's files (path below its folder -> content), its manifest last; return the manifest."""
    peft_config = json.loads(contents["adapter_config.json"])
    target = adapters / version
    for path, data in contents.items():
        folder, _, name = path.rpartition("/")
        (target / folder if folder else target).write_bytes(name, data)
    manifest = AdapterManifest(
        name=adapters.name,
        version=version,
        base_model=base.name,
        base_revision=base.revision,
        tokenizer_digest=base.tokenizer_digest,
        chat_template_digest=base.chat_template_digest,
        rank=peft_config["r"],
        target_modules=sorted(peft_config["target_modules"]),
        run_id=run_id,
        data_digest=data_digest,
        **(measured or {"scores": {}, "metric": "substring_match"}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        probe=probe,
        forced=forced or {},
        files={path: hashlib.sha256(data).hexdigest() for path, data in contents.items()},
    )
    target.write_json(MANIFEST, asdict(manifest))
    return asdict(manifest)


def move_alias(adapters: Folder, version: str, back: bool = False) -> None:
    """Let the name mean this version, and remember what it meant before, newest first.

    When it goes `back`, the version that it leaves goes last, so that to go back again leads to an older one.
    """
    alias = adapters.read_json(ALIAS) or {}
    live, before = alias.get("version"), alias.get("before", [])
    if live != version:
        before = [old for old in ((*before, live) if back else (live, *before)) if old not in (None, version)]
        adapters.write_json(ALIAS, alias | {"version": version, "before": before})


def _index_files(run_dir: str) -> dict[str, bytes]:
    from pipeline.retrieve import PassageIndex, passages_of

    with tempfile.TemporaryDirectory(prefix="index-") as folder:
        PassageIndex.build(passages_of(run_dir)).save(Path(folder))
        return {f"{RETRIEVAL}/{file.name}": file.read_bytes() for file in sorted(Path(folder).iterdir())}
