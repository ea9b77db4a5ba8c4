"""Everything that is offered builds, and every document fits its schema, strictly."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.offered import settings_of
from tests.deploy.rendering import (
    AUTOSCALERS,
    K8S,
    MODEL_VOLUMES,
    ROOT,
    SWITCHES,
    Document,
    Rendering,
    all_combinations,
    build,
    build_combinations,
    container,
    environment,
    telling_combinations,
)

FLOOR = "1.32"
NEWEST = kubernetes_validate.latest_version()
CUSTOM = json.loads((Path(__file__).parent / "custom_resources.json").read_text())


def unique_documents(everything: list[Rendering]) -> list[tuple[str, Document]]:
    found = {id(document): (r.name, document) for r in everything for document in r.documents}
    return list(found.values())


def test_every_component_is_offered() -> None:
    offered = {name for name in (*AUTOSCALERS, *MODEL_VOLUMES, *SWITCHES) if name}
    assert {path.name for path in (K8S / "components").iterdir()} == offered


def test_identities_are_unique(everything: list[Rendering]) -> None:
    for rendered in everything:
        identities = [(d["kind"], d["metadata"]["name"]) for d in rendered.documents]
        assert len(set(identities)) == len(identities), rendered.name
        assert {"gateway", "tokenizer", "engine"} <= rendered.names("Deployment")


def test_every_pair_of_components_is_rendered() -> None:
    chosen = [set(names) for names in telling_combinations()]
    switches = [{name} for name in SWITCHES]
    choices = [{name} for name in (*AUTOSCALERS, *MODEL_VOLUMES) if name]
    for pair in itertools.combinations([*switches, *choices], 2):
        both = set.union(*pair)
        excluded = both <= {*AUTOSCALERS} or both <= {*MODEL_VOLUMES}
        assert excluded != any(both <= names for names in chosen), both


def check_schemas(renderings: list[Rendering], version: str) -> None:
    for name, document in unique_documents(renderings):
        identity = f"{document['apiVersion']}/{document['kind']}"
        if identity in CUSTOM:
            schema: dict[str, Any] = {**CUSTOM[identity], "$defs": CUSTOM["$defs"]}
            jsonschema.Draft202012Validator(schema).validate(document)
            continue
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name}: {identity} {document['metadata']['name']}: {error}")


@pytest.mark.parametrize("version", [FLOOR, NEWEST])
def test_every_document_fits_its_schema(everything: list[Rendering], version: str) -> None:
    check_schemas(everything, version)


@pytest.mark.slow
def test_all_combinations_build_and_fit(build_command: list[str], tmp_path: Path) -> None:
    """All of them, where `everything` is a choice."""
    renderings = build_combinations(build_command, tmp_path, all_combinations())
    assert len(renderings) == len(AUTOSCALERS) * len(MODEL_VOLUMES) * 2 ** len(SWITCHES)
    for version in (FLOOR, NEWEST):
        check_schemas(renderings, version)


@pytest.mark.parametrize("version", [FLOOR, NEWEST])
def test_the_job_that_loads_a_model_fits(overlays: dict[str, Rendering], version: str) -> None:
    """Its schema, and the claim, user and paths of what it loads for."""
    job = yaml.safe_load((K8S / "load-model.yaml").read_text())
    kubernetes_validate.validate(job, version, strict=True)
    spec = job["spec"]["template"]["spec"]
    claim = spec["volumes"][0]["persistentVolumeClaim"]["claimName"]
    overlays["gpu"].get("PersistentVolumeClaim", claim)
    engine = overlays["gpu"].get("Deployment", "engine")["spec"]["template"]["spec"]
    assert spec["securityContext"] == engine["securityContext"]
    (loader,) = spec["containers"]
    assert loader["securityContext"] == engine["containers"][0]["securityContext"]
    assert loader["command"] == ["cp", "-R", "/model", "/models/"]


def test_the_schemas_refuse_a_typo() -> None:
    """Strict means strict, for built-in and custom kinds."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"prts": []},
    }
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(service, FLOOR, strict=True)
    for identity, schema in CUSTOM.items():
        if identity == "$defs":
            continue
        version, _, kind = identity.rpartition("/")
        document = {
            "apiVersion": version,
            "kind": kind,
            "metadata": {"name": "a"},
            "spec": {"unknown": 1},
        }
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator({**schema, "$defs": CUSTOM["$defs"]}).validate(document)


def test_every_object_is_in_the_namespace(everything: list[Rendering]) -> None:
    for rendered in everything:
        for document in rendered.documents:
            if document["kind"] != "Namespace":
                assert document["metadata"]["namespace"] == "nanoinfer", document["metadata"]


def test_the_documented_overlay_builds(build_command: list[str], tmp_path: Path) -> None:
    """The one of docs/operations.md, beside the shipped ones."""
    text = (ROOT / "docs" / "operations.md").read_text()
    (sample,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    shutil.copytree(K8S, tmp_path / "k8s")
    folder = tmp_path / "k8s" / "overlays" / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(sample)
    rendered = build(build_command, folder)
    check_schemas([rendered], NEWEST)
    for name, deployment in rendered.services():
        assert container(deployment)["image"].startswith(f"registry.example.com/nanoinfer/{name}:")
        settings_of(name, environment(deployment))


def test_base_needs_no_custom_resource(overlays: dict[str, Rendering]) -> None:
    for name in ("base", "cpu"):
        for document in overlays[name].documents:
            assert f"{document['apiVersion']}/{document['kind']}" not in CUSTOM


def test_no_manifest_hides_what_does_not_exist() -> None:
    """What the services cannot do has no manifest."""
    text = "\n".join(path.read_text() for path in K8S.rglob("*.yaml")).lower()
    for absent in ("kind: ingress\n", "kind: httproute", "kind: certificate", "statefulset"):
        assert absent not in text
    assert not list((ROOT / "deploy").rglob("*.pem"))
