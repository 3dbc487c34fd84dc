"""The files of deploy/ parse, and say nothing that the command does not take."""

import argparse
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

import jaxembed
from jaxembed.serve.server import command
from jaxembed.serve.server.config import ENDING_SECONDS

DEPLOY = pathlib.Path(__file__).resolve().parents[3] / "deploy"
ROUTES = {"/v2/health/ready", "/v2/health/live"}


def documents(name):
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def containers(document):
    spec = document.get("spec", {})
    return spec.get("template", {}).get("spec", spec).get("containers", [])


def config_of(arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.config_from(parser.parse_args(arguments), {})


@pytest.mark.parametrize("name", ["gke.yaml", "kserve.yaml"])
def test_containers_start_with_what_the_command_takes(name):
    found = [(document, container) for document in documents(name) for container in containers(document)]
    assert found
    for document, container in found:
        arguments = [
            argument.replace("{{.Name}}", document["metadata"]["name"]) for argument in container["args"]
        ]
        config = config_of(arguments)
        ports = {config.http_port, config.grpc_port}
        assert {port["containerPort"] for port in container["ports"]} <= ports
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            if probe in container:
                assert container[probe]["httpGet"]["path"] in ROUTES
        pod = document["spec"].get("template", {}).get("spec", {})
        limit = pod.get("terminationGracePeriodSeconds", 30)  # Kubernetes' own
        assert config.drain_grace + config.drain_timeout + ENDING_SECONDS < limit
        # What is requested is no limit, by which the server could tell how many there are for it.
        cores = int(container["resources"]["requests"]["cpu"])
        assert config.workers * config.threads == config.workers * config.batches_at_once == cores


@pytest.mark.parametrize("name", ["gke.yaml", "kserve.yaml"])
def test_servers_take_the_admin_token_of_a_secret_if_there_is_one(name):
    text = (DEPLOY / name).read_text()
    found = [container for document in documents(name) for container in containers(document)]
    for container in found:
        (variable,) = [entry for entry in container["env"] if entry["name"] == "JAXEMBED_ADMIN_TOKEN"]
        secret = variable["valueFrom"]["secretKeyRef"]
        assert secret["optional"] is True
        assert f"create secret generic {secret['name']} --from-literal={secret['key']}=" in text
    assert found


def test_kinds_and_references():
    kinds = {document["kind"]: document for document in documents("gke.yaml")}
    assert kinds.keys() == {"Deployment", "ServiceAccount", "Service", "HorizontalPodAutoscaler"}
    deployment = kinds["Deployment"]
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    assert account == kinds["ServiceAccount"]["metadata"]["name"]
    assert deployment["spec"]["selector"]["matchLabels"] == kinds["Service"]["spec"]["selector"]
    assert deployment["spec"]["template"]["metadata"]["labels"] == kinds["Service"]["spec"]["selector"]
    target = kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    service, runtime = documents("kserve.yaml")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] in {f["name"] for f in runtime["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    (container,) = runtime["spec"]["containers"]
    ports, protocols = container["ports"], runtime["spec"]["protocolVersions"]
    assert len(ports) == len(protocols)  # none that KServe knows no port of


@pytest.mark.parametrize("version", ["1.29", "1.30", "1.31", "1.32", "1.33"])
def test_manifests_follow_the_schemas_of_kubernetes(version):
    """Those of KServe are its own; what they hold of Kubernetes is put where Kubernetes has it."""
    validate = pytest.importorskip("kubernetes_validate").validate
    for document in documents("gke.yaml"):
        validate(document, version, strict=True)
    service, runtime = documents("kserve.yaml")
    found = {k: v for k, v in runtime["spec"].items() if k not in ("supportedModelFormats", "protocolVersions")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": runtime["metadata"], "spec": found}
    validate(pod, version, strict=True)
    predictor = dict(service["spec"]["predictor"])
    model = predictor.pop("model")
    assert all(isinstance(predictor.pop(key), int) for key in ("minReplicas", "maxReplicas", "timeout"))
    assert isinstance(predictor.pop("containerConcurrency"), int)
    assert predictor == {}
    assert model.keys() <= {
        "modelFormat",
        "protocolVersion",
        "runtime",
        "storageUri",
        "resources",
        "args",
        "env",
    }
    assert (service["apiVersion"], runtime["apiVersion"]) == (
        "serving.kserve.io/v1beta1",
        "serving.kserve.io/v1alpha1",
    )


def test_versions_are_copied_whole_in_rising_order(tmp_path):
    """The script of the container beside the server, with folders of this machine."""
    pod = documents("gke.yaml")[0]["spec"]["template"]["spec"]
    (copy,) = pod["initContainers"]
    mounted = {mount["mountPath"] for mount in copy["volumeMounts"]}
    assert mounted == {"/bucket", "/bundles"}
    bucket, local = tmp_path / "bucket", tmp_path / "bundles"
    for name in ("10", "9", "11", "v1"):
        (bucket / name / "tables").mkdir(parents=True)
        (bucket / name / "tables" / "rows").write_text(name)
        if name != "11":  # it is still uploaded
            (bucket / name / "manifest.json").write_text("{}")
    (local / ".copy" / "of-one-that-ended").mkdir(parents=True)
    (script,) = copy["args"]
    script = (
        script.replace("/bucket", str(bucket))
        .replace("/bundles", str(local))
        .replace("sleep 30 & wait $!", "break")
    )
    traced = subprocess.run([*copy["command"], f"set -x\n{script}"], check=True, capture_output=True, text=True)
    assert sorted(path.name for path in local.iterdir()) == ["10", "9"]
    assert (local / "9" / "tables" / "rows").read_text() == "9"
    assert sorted(path.name for path in (local / "10").iterdir()) == ["manifest.json", "tables"]
    moves = [line for line in traced.stderr.splitlines() if line.startswith("+ mv")]
    assert [line.rpartition("/")[2] for line in moves] == ["9", "10"]  # a delta comes after what it is one of


def test_image_is_not_built_without_the_kernel():
    text = (DEPLOY / "Dockerfile").read_text()
    program = re.search(r'^RUN .*python -c "(.*)"$', text, re.M)[1]
    for backend, status in (("auto", 0), ("xla", 1)):
        if backend == "auto" and jaxembed.backend() != "native":
            continue
        environment = os.environ | {"JAXEMBED_BACKEND": backend}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, check=False
        )
        assert done.returncode == status, done.stderr


def test_image_is_built_from_no_more_than_it_needs():
    ignored = (DEPLOY.parent / ".dockerignore").read_text().split()
    for folder in (".git", ".venv*", "data", "runs"):
        assert folder in ignored
    needed = {"jaxembed", "serve", "train", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"}
    assert not needed & set(ignored)


def test_dockerfile_starts_the_command():
    text = (DEPLOY / "Dockerfile").read_text()
    entry = re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1]
    default = re.search(r"^CMD (.*)$", text, re.M)[1]
    words = [word.strip('[]" ') for word in f"{entry},{default}".split(",")]
    assert words[:2] == ["jaxembed", "serve"]
    assert config_of(words[2:]).host == "0.0.0.0"


def test_replicas_of_ray_have_the_cores_the_token_and_the_modules_they_were_given(tmp_path, monkeypatch):
    """With as much of Ray as makes the application; it is run by Ray in `test_ray.py`."""
    serve = types.SimpleNamespace(
        Application=object,
        ingress=lambda build: lambda: build,
        deployment=lambda **_: lambda build: types.SimpleNamespace(bind=lambda: build),
    )
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(serve=serve))
    monkeypatch.setenv("JAXEMBED_ADMIN_TOKEN", "s3cret")
    monkeypatch.setenv("AIP_HTTP_PORT", "1234")  # not for it
    monkeypatch.setenv("NPROC", "99")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "imported_by_replicas.py").write_text("")
    specification = importlib.util.spec_from_file_location("ray_serve", DEPLOY / "ray_serve.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "make_app", lambda service, **_: service)
    for options, threads, batches in (("", 1, 1), ("--threads 3 --batches-at-once 2", 3, 2)):
        options += " --import imported_by_replicas"
        config = module.app({"bundles": str(tmp_path), "options": options})().config
        del sys.modules["imported_by_replicas"]
        assert (config.threads, config.batches_at_once, os.environ["NPROC"]) == (threads, batches, str(threads))
        assert (config.admin_token, config.http_port) == ("s3cret", 8000)


def test_vertex_variables():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    options = parser.parse_args([])
    config = command.config_from(options, {"AIP_HTTP_PORT": "8080", "AIP_STORAGE_URI": "/bundles"})
    assert (config.http_port, config.host, config.bundles) == (8080, "0.0.0.0", "/bundles")
    for environment, message in (
        ({}, "name the folder"),
        ({"AIP_STORAGE_URI": "gs://bucket"}, "must be mounted or copied"),
        ({"AIP_STORAGE_URI": "/b", "AIP_HTTP_PORT": "x"}, "AIP_HTTP_PORT must be a port"),
        ({"AIP_STORAGE_URI": "/b", "JAXEMBED_ADMIN_TOKEN": ""}, "unset JAXEMBED_ADMIN_TOKEN"),
    ):
        with pytest.raises(ValueError, match=message):
            command.config_from(options, environment)


def test_bodies_have_the_limit_that_the_command_says():
    assert config_of(["/bundles"]).max_body_bytes == 64 << 20
    assert config_of(["/bundles", "--max-body-bytes", "1000000"]).max_body_bytes == 1_000_000
