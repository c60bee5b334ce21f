"""Files for containers, clusters and systemd: valid by the schemas and linters that are installed, and in step with
each other and with the package. Their commands are run by ``tests/long/test_deployment_commands.py``."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaptive_fusion.serving.replica_options import ReplicaOptions
from adaptive_fusion.serving.settings import KEY_VARIABLE

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OBJECTS = [path for path in sorted(KUBERNETES.glob("*.yaml")) if path.name != "prometheus-adapter.yaml"]
SELDOM = {"InferenceService", "Kustomization", "PodMonitor"}
"""Kinds that are not Kubernetes' own."""


def documents(path: Path) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(path.read_text(encoding="utf-8")) if found]


def containers() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name of the file, the pod's specification and the container, of every workload."""
    found = []
    for path in OBJECTS:
        for each in documents(path):
            if each["kind"] == "Deployment":
                pod = each["spec"]["template"]["spec"]
            elif each["kind"] == "InferenceService":
                pod = each["spec"]["predictor"]
            else:
                continue
            found += [(path.name, pod, container) for container in pod["containers"]]
    return found


@pytest.mark.parametrize("path", OBJECTS, ids=lambda path: path.name)
def test_objects_are_valid_by_their_schemas(path: Path) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    checked = 0
    for each in documents(path):
        if each["kind"] not in SELDOM:
            validator.validate(each, "1.34", strict=True)
            checked += 1
    assert checked or path.name in ("kserve.yaml", "kustomization.yaml", "podmonitor.yaml")


def test_the_kserve_predictor_has_fields_that_kserve_knows() -> None:
    models = pytest.importorskip("kserve.models")
    predictor = documents(KUBERNETES / "kserve.yaml")[0]["spec"]["predictor"]
    known = set(models.V1beta1PredictorSpec.attribute_map.values())
    assert set(predictor) <= known


def test_kustomize_names_files_that_are_there() -> None:
    named = documents(KUBERNETES / "kustomization.yaml")[0]["resources"]
    assert all((KUBERNETES / name).is_file() for name in named)
    there = {path.name for path in OBJECTS}
    # One's own secrets, and KServe and the Prometheus operator, which not every cluster has, are applied by hand.
    assert there - set(named) == {"kustomization.yaml", "secret.example.yaml", "kserve.yaml", "podmonitor.yaml"}


@pytest.mark.parametrize(("name", "pod", "container"), containers(), ids=lambda value: value if value else None)
def test_workloads_are_probed_confined_and_have_time_to_end(
    name: str, pod: dict[str, Any], container: dict[str, Any]
) -> None:
    assert {"startupProbe", "readinessProbe", "livenessProbe", "resources"} <= set(container)
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert not re.search(r":latest$|^[^:@]+$", container["image"])
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    assert mounted == {volume["name"] for volume in pod.get("volumes", ())}
    if "adaptive-fusion" in container["image"]:
        before_s = int(container["lifecycle"]["preStop"]["exec"]["command"][-1])
        assert pod["terminationGracePeriodSeconds"] >= before_s + ReplicaOptions().drain_s + 5
        assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert KEY_VARIABLE in {row["name"] for row in container["env"]}


def test_a_rolling_update_of_the_gateway_begins_before_it_ends_anything() -> None:
    gateway = next(each for each in documents(KUBERNETES / "gateway.yaml") if each["kind"] == "Deployment")
    assert gateway["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_the_autoscaler_asks_for_metrics_that_the_adapter_makes_of_the_servers() -> None:
    from adaptive_fusion.serving.metrics import Metrics

    rules = documents(KUBERNETES / "prometheus-adapter.yaml")[0]["rules"]["custom"]
    scaler = documents(KUBERNETES / "autoscaling.yaml")[0]
    asked = {row["pods"]["metric"]["name"] for row in scaler["spec"]["metrics"]}
    assert asked == {rule["name"]["as"] for rule in rules}
    rendered = Metrics(["rung"]).render()[0].decode()
    for rule in rules:
        series = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])[0]
        assert re.search(rf"^{series}(\{{| )", rendered, re.M), series
    assert scaler["spec"]["scaleTargetRef"]["name"] == "gateway"


def test_kubectl_builds_the_whole() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    done = subprocess.run(["kubectl", "kustomize", str(KUBERNETES)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    kinds = [each["kind"] for each in yaml.safe_load_all(done.stdout)]
    assert kinds.count("Deployment") == 2 and "HorizontalPodAutoscaler" in kinds


def test_the_serve_configuration_has_arguments_that_replicas_take() -> None:
    config = documents(DEPLOY / "ray" / "serve.yaml")[0]
    for application in config["applications"]:
        module, _, name = application["import_path"].partition(":")
        assert (module, name) == ("adaptive_fusion.serving.ray", "app")
        ReplicaOptions.of({**application["args"], "api_key": "a key"})
    schema = pytest.importorskip("ray.serve.schema")
    assert schema.ServeDeploySchema.model_validate(config).applications


def test_the_dockerfile_passes_its_linter() -> None:
    if shutil.which("hadolint") is None and not (Path(sys.executable).parent / "hadolint").exists():
        pytest.skip("needs hadolint")
    linter = shutil.which("hadolint") or str(Path(sys.executable).parent / "hadolint")
    done = subprocess.run([linter, str(DEPLOY / "docker" / "Dockerfile")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_images_are_pinned_small_and_no_ones_root() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM (.*)$", text, re.M)[-1] == "base AS cpu"  # without a target, the small one
    assert re.search(r"^USER 10001:10001$", text, re.M) and "HEALTHCHECK" in text
    assert re.search(r"^ARG PYTHON=python:3\.\d+\.\d+-slim", text, re.M)
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    for name, service in compose["services"].items():
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    assert not re.search(r"pip install (?!.*(==|whl))", text)


def test_compose_is_valid_and_mounts_what_is_there() -> None:
    path = DEPLOY / "docker" / "compose.yaml"
    compose = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"gateway", "engine", "prometheus", "grafana", "server"} == set(compose["services"])
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (path.parent / source).exists() if source.startswith(".") else source in compose["volumes"]
    assert json.loads((DEPLOY / "grafana" / "adaptive-fusion.json").read_text())["uid"]
    assert (path.parent / compose["configs"]["prometheus"]["file"]).is_file()
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_systemd_accepts_the_unit_and_finds_it_confined(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze")
    unit = (DEPLOY / "systemd" / "adaptive-fusion.service").read_text(encoding="utf-8")
    path = tmp_path / "adaptive-fusion.service"
    path.write_text(unit.replace("/opt/adaptive-fusion/bin/adaptive-fusion", sys.executable))
    verified = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=120)
    assert "adaptive-fusion.service" not in verified.stderr, verified.stderr
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(path)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0
