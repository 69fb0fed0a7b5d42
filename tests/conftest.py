"""What several test files share: a local Ray, a bucket, a small tokenizer, and stages of documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.config import Cluster, Config
from pipeline.schema import DOCUMENT, Document, to_table
from pipeline.stage import ray_session, start_ray
from pipeline.store import Folder, Stage

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A local Ray that finds no extension that an earlier run has compiled."""
    with pytest.MonkeyPatch.context() as patch, ray_session():
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        start_ray(Cluster())
        yield


@pytest.fixture(scope="session")
def bucket() -> Iterator[Folder]:
    """Return a bucket on an S3 server of our own; the URI carries all that Ray's workers need to reach it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    uri = f"s3://key:secret@bucket?endpoint_override={host}:{port}&scheme=http"
    filesystem, path = pafs.FileSystem.from_uri(f"{uri}&allow_bucket_creation=true")
    filesystem.create_dir(path)
    yield Folder(uri)
    server.stop()


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder with the tokenizer.json of a small byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = [ROOT / "pipeline" / name for name in ("read.py", "parse.py", "chunk.py")]
    tokenizer.train([str(source) for source in sources], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


@pytest.fixture(scope="session")
def embedding_model(tokenizer_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a sentence-transformers model that embeds a text as the mean of its tokens' random vectors."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    weights = np.random.default_rng(0).normal(size=(2000, 256)).astype(np.float32)
    words = StaticEmbedding(Tokenizer.from_file(f"{tokenizer_dir}/tokenizer.json"), embedding_weights=weights)
    folder = str(tmp_path_factory.mktemp("embedding") / "model")
    SentenceTransformer(modules=[words], device="cpu").save(folder)
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def make_config(run_dir: str, **sections: Any) -> Config:
    """Return a config of which a test needs these sections only."""
    unused = {
        "model": {"path": "unused"},
        "read": {"paths": ["unused"]},
        "publish": {"registry": "unused", "name": "a"},
    }
    return Config.model_validate({"run_dir": run_dir} | unused | sections)


def write_documents(run_dir: str, name: str, units: list[list[Document]]) -> Stage:
    """Complete a stage that holds these documents, one shard per unit."""
    stage = Stage(run_dir, name)
    stage.open({})
    for number, documents in enumerate(units):
        stage.commit(f"{number:06d}", [to_table(documents, DOCUMENT)], [], len(documents))
    stage.close(0)
    return stage


def rows(stage: Stage) -> list[dict[str, Any]]:
    return [row for shard in stage.shards() for row in stage.read_shard(shard).to_pylist()]


def assert_counted(manifest: dict[str, Any]) -> None:
    assert manifest["rows_in"] == manifest["rows_out"] + sum(manifest["rejected"].values())
