"""The Kubernetes manifest of docs/machines.md has the keys and types that the operator knows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = (Path(__file__).parents[2] / "docs" / "machines.md").read_text()
PLAIN = {"str": str, "int": int, "bool": bool, "float": (int, float), "object": object}


def strange(value: Any, kind: str, where: str) -> list[str]:
    """What of a part of a manifest is not as the generated models of the API say."""
    import kubernetes.client as core
    from kubeflow import training

    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [s for i, v in enumerate(value) for s in strange(v, inner[1], f"{where}[{i}]")]
    if inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        return [s for k, v in value.items() for s in strange(v, inner[1], f"{where}.{k}")]
    if kind in PLAIN:
        fits = isinstance(value, PLAIN[kind]) and (kind != "int" or not isinstance(value, bool))
        return [] if fits else [f"{where} is no {kind}: {value!r}"]
    name = re.sub("^K8sIo(Api|ApimachineryPkgApisMeta)(Core)?", "", kind)
    model = getattr(training, kind, None) or getattr(core, name)
    if not isinstance(value, dict):
        return [f"{where} is no {name}: {value!r}"]
    kinds = {key: model.openapi_types[own] for own, key in model.attribute_map.items()}
    known = {key: part for key, part in value.items() if key in kinds}
    return [f"{where}.{key} is not known" for key in value.keys() - known.keys()] + [
        s for key, part in known.items() for s in strange(part, kinds[key], f"{where}.{key}")
    ]


@pytest.fixture
def manifest() -> dict[str, Any]:
    (text,) = re.findall(r"```yaml\n(apiVersion: kubeflow.*?)```", PAGE, re.DOTALL)
    return dict(yaml.safe_load(text))


def test_the_operator_knows_every_key(manifest: dict[str, Any]) -> None:
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert not strange(manifest, "KubeflowOrgV1PyTorchJob", "manifest")


def test_what_it_does_not_know_is_told(manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]
    spec["elasticPolicy"]["maxRestart"] = 3
    pod = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    pod["terminationGracePeriodSeconds"] = "300"
    pod["containers"][0]["env"][0]["val"] = "1"
    found = strange(manifest, "KubeflowOrgV1PyTorchJob", "manifest")
    assert sorted(line.rpartition(".")[2] for line in found) == [
        "maxRestart is not known",
        "terminationGracePeriodSeconds is no int: '300'",
        "val is not known",
    ]
