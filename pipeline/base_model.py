"""What a base-model folder is: the digests that tie stored answers and adapters to it, and the checks at the door.

In: the folder's path. Out: `BaseModel`, or a `ValueError` that says what the folder lacks.
Reads files only: no torch, no transformers, so a wrong path costs milliseconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pipeline.schema import digest

_SAMPLE_BLOCKS = 64
_SAMPLE_BYTES = 65_536
_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_SCALED = ("logits_scaling", "logit_scale", "final_logit_softcapping")


@dataclass(frozen=True)
class BaseModel:
    """`revision` covers the config and evenly spaced samples of every weight file, so that 100 GB take no minutes."""

    path: str
    name: str
    revision: str
    tokenizer_digest: str
    chat_template_digest: str

    def identity(self) -> dict[str, str]:
        """What student and teacher must share, as the manifests of the stages that depend on it record it."""
        return {
            "revision": self.revision,
            "tokenizer": self.tokenizer_digest,
            "chat_template": self.chat_template_digest,
        }


def load_base_model(path: str) -> BaseModel:
    """Digest a Hugging Face folder; ValueError if it is missing or incomplete, or of a kind that cannot be trained."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model.path = {path!r}: no such folder; give the folder of a Hugging Face model")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"model.path = {path!r}: {name} is missing; give the folder of a Hugging Face model")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"model.path = {path!r}: no *.safetensors file; convert the weights with save_pretrained")
    _refuse_kind(path, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return BaseModel(
        path=str(folder.resolve()),
        name=folder.resolve().name,
        revision=digest((folder / "config.json").read_bytes(), *(_sample(file) for file in weights)),
        tokenizer_digest=digest((folder / "tokenizer.json").read_bytes()),
        chat_template_digest=digest(_chat_template(folder)),
    )


def refuse_unknown_layers(path: str, names: list[str]) -> None:
    """Raise ValueError for names of layers that none of the model's weights belongs to, as PEFT matches them."""
    layers: set[str] = set()
    for file in Path(path).expanduser().glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            layers |= {f".{key.rpartition('.')[0]}" for key in weights.keys()}  # noqa: SIM118 (no mapping)
    for name in names:
        if not any(layer.endswith(f".{name}") for layer in layers):
            known = sorted({layer.rpartition(".")[2] for layer in layers if layer.endswith("_proj")})
            raise ValueError(
                f"train.lora.target_modules: {path!r} has no layer {name!r}; take some of {', '.join(known)}, or "
                '"all-linear"'
            )


def _refuse_kind(path: str, config: dict[str, Any]) -> None:
    """Raise ValueError for what training would get wrong, before anything is written with it."""
    config |= config.get("text_config") or {}
    if other := set(config.get("layer_types") or ()) - _ATTENTION:
        raise ValueError(
            f"model.path = {path!r} has layers of type {', '.join(sorted(other))}, through which samples that share a "
            "row would see each other; use a model whose layers are all attention"
        )
    if scaled := [name for name in _SCALED if config.get(name) not in (None, 1, 1.0)]:
        raise ValueError(
            f"model.path = {path!r} changes its logits ({scaled[0]} = {config[scaled[0]]}), which training does not; "
            "use a model that does not"
        )


def _chat_template(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    if not template:
        raise ValueError(
            f"model.path = {folder}: the tokenizer has no chat template; use an instruct model, "
            "or put its template into chat_template.jinja"
        )
    return template if isinstance(template, str) else json.dumps(template, sort_keys=True)


def _sample(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        blocks = []
        for index in range(_SAMPLE_BLOCKS):
            stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLE_BLOCKS - 1))
            blocks.append(stream.read(_SAMPLE_BYTES))
    return digest(file.name, size, *blocks)
