"""Adapter + scores -> an immutable version in the registry, and the alias that points at it.

In: the complete train stage, the corpus's passages, and the scores if there are any. Out:

    REGISTRY/<name>/<version>/               PEFT safetensors and config
    REGISTRY/<name>/<version>/retrieval/     the passages and their BM25 index
    REGISTRY/<name>/<version>/manifest.json  what it is and the digest of every file; written last
    REGISTRY/<name>/live.json                the alias: which version `name` means, and which it meant before

A version is named by its content, so a name never gets a second content, and publishing twice changes nothing.
"""

import hashlib
import json
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.evaluate import copy_adapter
from pipeline.retrieve import PassageIndex, corpus_passages
from pipeline.schema import ANSWER, DOCUMENT, PASSAGE, QUESTION, AdapterManifest, Probe, digest
from pipeline.store import Folder, Stage

ALIAS = "live.json"
MANIFEST = "manifest.json"
RETRIEVAL = "retrieval"
PROBE_QUESTIONS = 8
PROBE_TOKENS = 12


def publish_adapter(config: Config, base: BaseModel) -> dict[str, Any]:
    """Publish and point the alias `live` at the version; return the manifest with `uri` added."""
    train = Stage(config.run_dir, "train", ANSWER)
    trained = train.require()
    evaluated = Stage(config.run_dir, "evaluate", ANSWER).manifest() or {}
    passages = Stage(config.run_dir, "chunk", PASSAGE).require()["data_digest"]
    source = train.folder / "adapter"
    contents = {name: source.read_bytes(name) for name in source.list()}
    adapters = Folder(config.publish.registry) / config.publish.name
    version = name_version(base, contents, passages)
    manifest = (adapters / version).read_json(MANIFEST)
    if manifest is None:
        print(f"publish: {config.publish.name}@{version}: indexing passages, recording a probe", file=sys.stderr)
        manifest = write_version(
            adapters,
            version,
            base,
            contents | _index_files(config.run_dir),
            probe=_probe(config, base),
            run_id=trained["data_digest"],
            data_digest=trained["settings"]["input"],
            scores=evaluated.get("scores", {}),
        )
    move_alias(adapters, version)
    return manifest | {"uri": (adapters / version).uri}


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
    scores: dict[str, dict[str, float]] | None = None,
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
        scores=scores or {},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        probe=probe,
        files={path: hashlib.sha256(data).hexdigest() for path, data in contents.items()},
    )
    target.write_json(MANIFEST, asdict(manifest))
    return asdict(manifest)


def move_alias(adapters: Folder, version: str) -> None:
    """Let the name mean this version, and remember what it meant before, newest first."""
    alias = adapters.read_json(ALIAS) or {}
    live, before = alias.get("version"), alias.get("before", [])
    if live != version:
        before = [old for old in (live, *before) if old not in (None, version)]
        adapters.write_json(ALIAS, alias | {"version": version, "before": before})


def _index_files(run_dir: str) -> dict[str, bytes]:
    passages = corpus_passages(Stage(run_dir, "dedup", DOCUMENT), Stage(run_dir, "chunk", PASSAGE))
    with tempfile.TemporaryDirectory(prefix="index-") as folder:
        PassageIndex.build(passages).save(Path(folder))
        return {f"{RETRIEVAL}/{file.name}": file.read_bytes() for file in sorted(Path(folder).iterdir())}


def _probe(config: Config, base: BaseModel) -> Probe | None:
    """Record the adapter's greedy answer under PEFT to the training question where it differs most from the base."""
    answers = Stage(config.run_dir, "filter", ANSWER)
    questions = Stage(config.run_dir, "question", QUESTION)
    unit = next((unit.name for unit in answers.units() if unit.rows_out), None)
    if unit is None:
        return None
    rows = answers.read_unit(unit).select(["question_id", "prompt_ids"]).slice(0, PROBE_QUESTIONS).to_pylist()
    texts = {row["question_id"]: row["text"] for row in questions.read_unit(unit).to_pylist()}
    asked = [row | {"text": texts[row["question_id"]]} for row in rows]
    worker = ray.remote(num_cpus=config.cluster.worker_cpus, num_gpus=config.cluster.worker_gpus, max_calls=1)(
        _record_probe
    )
    return ray.get(worker.remote(config, base.path, asked))


def _record_probe(config: Config, base_path: str, asked: list[dict[str, Any]]) -> Probe:
    from pipeline.student import greedy_replies

    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        copy_adapter(config, folder)
        prompts = [row["prompt_ids"] for row in asked]
        replies = greedy_replies(config.cluster.worker_cpus, base_path, folder, prompts, PROBE_TOKENS)
    differing = [number for number, reply in enumerate(replies) if reply.adapter_ids != reply.base_ids]
    best = max(differing or range(len(replies)), key=lambda number: replies[number].margin)
    return Probe(asked[best]["text"], prompts[best], replies[best].adapter_ids)
