"""The recipes are well formed, agree with the locks, and pass KubeRay's schema where it is at hand."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT

MANIFESTS = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))


def ray_version() -> str:
    lock = (ROOT / "cluster" / "locks" / "gpu.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lock if line.startswith("ray"))


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_says_what_every_cluster_must(path: Path) -> None:
    spec = cluster_spec(yaml.safe_load(path.read_text()))
    assert spec["rayVersion"] == ray_version()
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "the head runs no work"
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] == 0 and spec["enableInTreeAutoscaling"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod.get("volumes", [])}
        assert "models" in mounted, "drivers run on the head and read the model's digests"


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_a_manifest_passes_kuberays_schema(path: Path) -> None:
    folder = os.environ.get("KUBERAY_SCHEMAS")
    if not folder:
        pytest.skip("KUBERAY_SCHEMAS names no folder of KubeRay's custom resource definitions")
    manifest = yaml.safe_load(path.read_text())
    definition = yaml.safe_load(Path(folder, f"ray.io_{manifest['kind'].lower()}s.yaml").read_text())
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    jsonschema.validate(manifest, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(manifest | {"spec": manifest["spec"] | {"rayVersions": "2"}}, schema)


def closed(schema: Any) -> Any:
    """Refuse unknown keys, as Kubernetes' own validation of a resource definition does."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: closed(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("type", None)
    return schema


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_an_autoscaler_file_passes_rays_own_validation(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    validate_config(prepare_config(config))
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0 and types["gpu"]["min_workers"] == 0
    assert "RAY_AUTH_MODE=token" in " ".join(config["docker"]["run_options"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config | {"max_worker": 3}))


def test_the_slurm_script_is_valid() -> None:
    script = ROOT / "cluster" / "slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if checker := shutil.which("shellcheck"):
        done = subprocess.run([checker, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
