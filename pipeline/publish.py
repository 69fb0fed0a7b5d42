"""Adapter + scores -> an immutable version in the registry.

In: the complete train stage, and the scores if there are any. Out: REGISTRY/<name>/<version>/ with the PEFT files and
`manifest.json`, written last, and the alias file REGISTRY/<name>/live.json. A version is named by its content, so a
name never gets a second content, and publishing twice changes nothing.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from pipeline.base_model import BaseModel
from pipeline.config import Config
from pipeline.schema import ANSWER, AdapterManifest, digest
from pipeline.store import Folder, Stage

ALIAS = "live.json"


def publish_adapter(config: Config, base: BaseModel) -> dict[str, Any]:
    """Publish and point the alias `live` at the version; return the manifest with `uri` added."""
    train = Stage(config.run_dir, "train", ANSWER)
    trained = train.require()
    evaluated = Stage(config.run_dir, "evaluate", ANSWER).manifest() or {}
    source = train.folder / "adapter"
    contents = {name: source.read_bytes(name) for name in source.list()}
    peft_config = json.loads(contents["adapter_config.json"])
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    version = digest(base.revision, *(part for item in sorted(files.items()) for part in item))[:16]
    adapters = Folder(config.publish.registry) / config.publish.name
    target = adapters / version
    manifest = target.read_json("manifest.json")
    if manifest is None:
        manifest = asdict(
            AdapterManifest(
                name=config.publish.name,
                version=version,
                base_model=base.name,
                base_revision=base.revision,
                tokenizer_digest=base.tokenizer_digest,
                chat_template_digest=base.chat_template_digest,
                rank=peft_config["r"],
                target_modules=sorted(peft_config["target_modules"]),
                run_id=trained["data_digest"],
                data_digest=trained["settings"]["input"],
                scores=evaluated.get("scores", {}),
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                files=files,
            )
        )
        for name, data in contents.items():
            target.write_bytes(name, data)
        target.write_json("manifest.json", manifest)
    adapters.write_json(ALIAS, {"version": version})
    return manifest | {"uri": target.uri}
