"""Adapters with random weights, published like trained ones: for measuring and testing the endpoint.

In: a base-model folder and names. Out: one version per name in a registry, with the probe that PEFT answers, and the
live alias on it. No two adapters answer alike, so that an answer shows which adapter gave it.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from pipeline.base_model import BaseModel, load_base_model
from pipeline.config import Lora
from pipeline.engine import load_tokenizer, render_chat
from pipeline.prompts import student_chat
from pipeline.publish import move_alias, name_version, write_version
from pipeline.schema import Probe
from pipeline.store import Folder
from pipeline.student import add_adapter, continue_greedily, load_base

QUESTION = "What do you know about the mill on the river?"
NOISE = 0.06  # at rank 8: enough to change every answer from its first words on, not enough to lose all sense


def publish_random_adapters(registry: str, model_path: str, names: list[str], rank: int = 16, seed: int = 0) -> None:
    """Publish one adapter per name; the same seed and name give the same weights."""
    base = load_base_model(model_path)
    tokenizer = load_tokenizer(model_path)
    prompt = render_chat(tokenizer, student_chat(QUESTION))
    model = add_adapter(load_base(model_path), Lora(rank=rank), base.name).eval()
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * NOISE * (8 / rank) ** 0.25)
        answer_ids, _ = continue_greedily(model, prompt, max_tokens=8)
        _publish(Folder(registry) / name, base, model, Probe(QUESTION, prompt, answer_ids))


def _publish(adapters: Folder, base: BaseModel, model: PeftModel, probe: Probe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        files = ("adapter_model.safetensors", "adapter_config.json")
        contents: dict[str, Any] = {file: Path(folder, file).read_bytes() for file in files}
    version = name_version(base, contents, "")
    write_version(adapters, version, base, contents, probe=probe)
    move_alias(adapters, version)
