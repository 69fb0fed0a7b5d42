import pytest

from pipeline.config import Cluster, Model
from pipeline.engine import Engine


def test_a_cpu_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(OSError, match=r"no-such-compiler.* CXX"):
        Engine(Model(path="never-loaded"), Cluster())
