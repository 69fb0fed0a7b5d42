"""What a base-model folder must have, and what kinds of model are refused before anything is written with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.base_model import load_base_model, refuse_unknown_layers


def write_model(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return str(folder)


def test_the_revision_changes_with_config_and_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path, layer_types=["full_attention", "sliding_attention"], logit_scale=1.0)
    first = load_base_model(path)
    assert first == load_base_model(path)
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert load_base_model(path).revision != first.revision
    assert load_base_model(path).tokenizer_digest == first.tokenizer_digest


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name.replace("model.", "")):
        load_base_model(path)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"layer_types": ["full_attention", "conv"]}, "layers of type conv"),
        ({"text_config": {"layer_types": ["linear_attention"]}}, "linear_attention"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"logits_scaling": 8}, "logits_scaling = 8"),
    ],
)
def test_what_training_would_get_wrong_is_refused(tmp_path: Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_base_model(write_model(tmp_path, **config))


def test_layers_that_a_model_lacks_are_refused(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight")
    save_file({name: np.zeros(1) for name in names}, tmp_path / "model.safetensors")
    refuse_unknown_layers(str(tmp_path), ["q_proj", "mlp.down_proj", "lm_head"])
    for name in ("gate_proj", "proj", "mlp"):
        with pytest.raises(ValueError, match=f"has no layer '{name}'; take some of down_proj, q_proj, or"):
            refuse_unknown_layers(str(tmp_path), ["q_proj", name])
