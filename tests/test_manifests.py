"""What starts the image elsewhere: every flag, variable, port, path and figure that it names exists in the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import kubernetes_validate
import pytest
import tomllib
import yaml
from prometheus_client.parser import text_string_to_metric_families

from owl_deploy.cli import cli
from owl_deploy.serve.metrics import ServerMetrics
from owl_deploy.serve.settings import API_KEY, ServeSettings

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
PORT = 8000
KUBERNETES = "1.37"


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def by_kind() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in documents(DEPLOY / "kubernetes.yaml")}


def pod() -> dict[str, Any]:
    return cast("dict[str, Any]", by_kind()["Deployment"]["spec"]["template"]["spec"])


def predictor() -> dict[str, Any]:
    return cast("dict[str, Any]", documents(DEPLOY / "kserve.yaml")[0]["spec"]["predictor"])


def compose() -> dict[str, Any]:
    (service,) = documents(ROOT / "docker-compose.yaml")[0]["services"].values()
    return cast("dict[str, Any]", service)


def known_variables() -> set[str]:
    """Every environment variable that the command reads."""
    return {str(parameter.envvar) for parameter in cli.commands["serve"].params if parameter.envvar} | {API_KEY}


def known_paths() -> set[str]:
    """Every path that the server answers."""
    from owl_deploy.serve import routes

    source = Path(routes.__file__).read_text(encoding="utf-8")
    return set(re.findall(r'"(/[a-z0-9/]+)"', source))


def exported_metrics() -> set[str]:
    """Every figure as Prometheus reads it."""
    metrics = ServerMetrics()
    scheduler = SimpleNamespace(n_active=0, n_waiting=0, n_positions=0)
    metrics.watch(cast("Any", scheduler), kv_bytes=0)
    text = metrics.text().decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


PODS = pytest.mark.parametrize("spec", [pod(), predictor()], ids=["kubernetes", "kserve"])


# Against Kubernetes' own schemas.


@pytest.mark.parametrize("kind", ["Deployment", "Service", "HorizontalPodAutoscaler"])
def test_kubernetes_takes_the_document(kind: str) -> None:
    kubernetes_validate.validate(by_kind()[kind], KUBERNETES, strict=True)


def test_kubernetes_refuses_a_field_that_is_misspelt() -> None:
    document = by_kind()["Deployment"]
    document["spec"]["template"]["spec"]["terminationGracePeriod"] = 5
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_pod_of_the_inference_service_is_one_that_kubernetes_takes() -> None:
    """KServe has no schema here: its predictor is a pod, but for the fields that are KServe's own."""
    spec = {key: value for key, value in predictor().items() if key not in PREDICTOR_FIELDS}
    document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


PREDICTOR_FIELDS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "timeout"}


def test_inference_service_has_what_kserve_asks_for() -> None:
    (document,) = documents(DEPLOY / "kserve.yaml")
    assert (document["apiVersion"], document["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (container,) = predictor()["containers"]
    assert container["name"] == "kserve-container"
    assert container["ports"] == [{"name": "http1", "containerPort": PORT, "protocol": "TCP"}]
    assert predictor()["timeout"] > ServeSettings().request_timeout_s


# Against the code.


@PODS
def test_every_variable_exists_and_every_value_is_one_that_serve_takes(spec: dict[str, Any]) -> None:
    (container,) = spec["containers"]
    entries = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert set(entries) <= known_variables()
    values = {name.removeprefix("OWL_DEPLOY_").lower(): value for name, value in entries.items() if value is not None}
    assert ServeSettings(**values).batch_size == 8


def test_every_variable_of_compose_exists() -> None:
    assert set(compose()["environment"]) <= known_variables()
    assert set(re.findall(r"OWL_DEPLOY_\w+", (ROOT / "docker-compose.yaml").read_text())) <= known_variables()


@pytest.mark.parametrize("path", [ROOT / "Dockerfile", *sorted(DEPLOY.glob("*.yaml"))], ids=lambda path: path.name)
def test_every_variable_in_comments_and_commands_exists(path: Path) -> None:
    assert set(re.findall(r"OWL_DEPLOY_[A-Z_]+", path.read_text())) <= known_variables()


@PODS
def test_every_probe_asks_a_path_that_is_answered(spec: dict[str, Any]) -> None:
    (container,) = spec["containers"]
    ports = {PORT, *(port["name"] for port in container["ports"] if port["containerPort"] == PORT)}
    probes = [value["httpGet"] for key, value in container.items() if key.endswith("Probe")]
    assert len(probes) >= 2
    for probe in probes:
        assert probe["path"] in known_paths()
        assert probe["port"] in ports


def test_probes_of_the_inference_service_are_those_of_its_protocol() -> None:
    (container,) = predictor()["containers"]
    paths = {container[probe]["httpGet"]["path"] for probe in ("readinessProbe", "livenessProbe")}
    assert paths == {"/v2/health/ready", "/v2/health/live"}


def test_service_and_autoscaler_find_their_pods() -> None:
    kinds = by_kind()
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert kinds["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert kinds["Service"]["spec"]["selector"] == labels
    (port,) = kinds["Service"]["spec"]["ports"]
    assert port["targetPort"] in {entry["name"] for entry in pod()["containers"][0]["ports"]}
    target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", kinds["Deployment"]["metadata"]["name"])


def test_autoscaler_reads_figures_that_are_exported_and_that_the_adapter_hands_on() -> None:
    wanted = {metric["pods"]["metric"]["name"] for metric in by_kind()["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    (values,) = documents(DEPLOY / "prometheus-adapter.yaml")
    handed_on = set()
    for rule in values["rules"]["custom"]:
        name = rule["seriesQuery"].partition("{")[0]
        assert f"{name}{{<<.LabelMatchers>>}}" in rule["metricsQuery"]
        assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
        handed_on.add(name)
    assert wanted == handed_on
    assert wanted <= exported_metrics()


def test_pods_are_scraped_where_the_figures_are() -> None:
    annotations = by_kind()["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in known_paths()
    assert annotations["prometheus.io/port"] == str(PORT)


def test_pod_is_one_more_sequence_short_of_full_when_another_is_asked_for() -> None:
    metrics = by_kind()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    targets = {metric["pods"]["metric"]["name"]: metric["pods"]["target"]["averageValue"] for metric in metrics}
    (batch_size,) = [e["value"] for e in pod()["containers"][0]["env"] if e["name"] == "OWL_DEPLOY_BATCH_SIZE"]
    assert 0 < int(targets["owl_deploy_active_requests"]) < int(batch_size)


# Rights and ends.


@PODS
def test_pod_has_no_rights(spec: dict[str, Any]) -> None:
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"]) == (10001, 10001)
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
    for amounts in (container["resources"]["requests"], container["resources"]["limits"]):
        assert set(amounts) == {"cpu", "memory"}


def test_compose_gives_no_rights_and_shows_the_port_to_this_machine_alone() -> None:
    service = compose()
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    assert service["volumes"] == ["${ARTIFACT:-./artifact}:/models:ro"]


def test_begun_answers_have_the_time_to_end() -> None:
    drain_s = ServeSettings().drain_timeout_s
    waits_s = pod()["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > drain_s + waits_s
    assert predictor()["terminationGracePeriodSeconds"] > drain_s
    assert int(compose()["stop_grace_period"].removesuffix("s")) > drain_s


def test_every_manifest_calls_the_image_by_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    names = {compose()["image"], pod()["containers"][0]["image"], predictor()["containers"][0]["image"]}
    assert names == {f"owl-deploy-quickstart:{version}"}


# The Dockerfile.


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_tool_that_writes_the_bill_is_the_one_that_tests_check() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (pinned,) = [name.partition("==")[2] for name in extras["dev"] if name.startswith("cyclonedx-python-lib")]
    assert f"cyclonedx-python-lib=={pinned} " in (ROOT / "Dockerfile").read_text()


def test_package_carries_the_files_of_the_source_tree() -> None:
    for link in (ROOT / "owl_deploy" / "image").iterdir():
        assert link.is_symlink()
        assert link.resolve() in {ROOT / link.name, DEPLOY / link.name}
