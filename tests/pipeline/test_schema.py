"""The records and their schemas agree, ids are stable, and the packages import what they may and no more."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.schema import DOCUMENT, REJECTED, Document, Rejected, digest, to_table
from tests.conftest import ROOT

# Package -> what it may import of ours.
MAY_IMPORT = {
    "pipeline": ("pipeline",),
    "serve": ("serve", "pipeline"),
    "cluster": ("cluster", "pipeline.config", "pipeline.resources", "pipeline.stage", "pipeline.store"),
}


def run_python(code: str) -> str:
    """Run the code in a fresh Python that starts in the checkout, as `python -m pipeline` does."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["Document", "Passage", "Question", "Answer", "Rejected"])
def test_records_and_schemas_agree(name: str) -> None:
    assert [field.name for field in fields(getattr(schema, name))] == getattr(schema, name.upper()).names


def test_to_table() -> None:
    assert to_table([], DOCUMENT).schema.equals(DOCUMENT) and not to_table([], DOCUMENT).num_rows
    rejected = Rejected("read", "a.txt", "empty", "no text")
    made = to_table([rejected, rejected], REJECTED)
    assert made.schema.equals(REJECTED) and [Rejected(**row) for row in made.to_pylist()] == [rejected] * 2
    with pytest.raises(pa.ArrowTypeError):
        to_table([Document("id", "source", "", 5)], DOCUMENT)  # type: ignore[arg-type]


def test_the_digest_is_stable() -> None:
    assert digest() == "e3b0c44298fc1c149afbf4c8996fb924"  # SHA-256 of nothing
    assert digest("a", b"b", 3) == "9292ad647de878191c7ec85b3039faeb"
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("3") == digest(b"3") == digest(3)
    assert digest("\udcff") != digest("\udcfe")


def test_config_and_schema_import_nothing_heavy() -> None:
    code = "import sys, pipeline.config, pipeline.schema; print(*sys.modules)"
    loaded = run_python(code).split()
    assert "pipeline.config" in loaded
    assert not {"torch", "ray", "vllm", "transformers", "pandas"} & set(loaded)


def imports(package: str) -> Iterator[tuple[str, str]]:
    """Yield each file of the package with the full name of each thing it imports, inside functions too."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: relative import"
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_dependencies_point_one_way() -> None:
    ours = {*MAY_IMPORT, "benchmarks", "tests"}
    wrong = [
        f"{package}/{file} imports {name}"
        for package, allowed in MAY_IMPORT.items()
        for file, name in imports(package)
        if name.partition(".")[0] in ours and not f"{name}.".startswith(tuple(f"{own}." for own in allowed))
    ]
    assert wrong == []
    assert ("read.py", "pipeline.config.Read") in imports("pipeline")


@pytest.mark.parametrize("package", [name for name in MAY_IMPORT if (ROOT / name).is_dir()])
def test_no_installed_package_shadows_ours(package: str) -> None:
    code = f"import importlib.util; print(*importlib.util.find_spec({package!r}).submodule_search_locations)"
    assert run_python(code) == str(ROOT / package)
