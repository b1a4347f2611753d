"""The files that start a cluster, checked as far as possible without a cloud."""

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

import cluster

PROJECT = Path(__file__).parents[2]
DEPLOY = Path(str(cluster.__file__)).parent / "deploy"
KUBERAY = yaml.safe_load((Path(__file__).parent / "kuberay-schema.yaml").read_text())


def content(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return loaded


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_rays_launcher_accepts_the_file_and_its_spot_workers_come_and_go(name: str) -> None:
    config = prepare_config(content(name))
    validate_config(config)
    head = config["available_node_types"][config["head_node_type"]]["node_config"]
    worker = config["available_node_types"]["gpu"]
    assert worker["min_workers"] == 0
    assert worker["max_workers"] == config["max_workers"]
    spot = ("InstanceMarketOptions", "scheduling")
    assert not any(field in head for field in spot)
    assert any(field in worker["node_config"] for field in spot)


def test_rays_launcher_refuses_an_unknown_field() -> None:
    config = prepare_config({**content("aws.yaml"), "max_wokers": 8})
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(config)


@pytest.mark.parametrize("name", ["kuberay-cluster.yaml", "kuberay-job.yaml"])
def test_kuberay_accepts_the_manifest(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(KUBERAY)
    jsonschema.validate(content(name), KUBERAY)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("shutdownAfterJobFinishes", "shutdownAfterJobFinish"),
        ("K8sJobMode", "JobMode"),
        ("minReplicas: 0", "minReplicas: none"),
        ('num-cpus: "0"', "num-cpus: 0"),
        ("mode: token", "mode: password"),
        ("image:", "imge:"),
    ],
)
def test_the_schema_refuses_a_mistake(old: str, new: str) -> None:
    text = (DEPLOY / "kuberay-job.yaml").read_text()
    assert old in text
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text.replace(old, new)), KUBERAY)


def test_every_volume_that_a_pod_mounts_is_defined() -> None:
    spec = content("kuberay-job.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"][
        "spec"
    ]
    mounted = {mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]}
    assert mounted == {volume["name"] for volume in spec["volumes"]}


def test_the_job_and_the_permanent_cluster_have_the_same_workers() -> None:
    job = content("kuberay-job.yaml")["spec"]["rayClusterSpec"]
    assert job["workerGroupSpecs"] == content("kuberay-cluster.yaml")["spec"]["workerGroupSpecs"]


def test_all_files_name_the_versions_of_this_environment() -> None:
    ray = metadata.version("ray")
    for path in DEPLOY.iterdir():
        text = path.read_text()
        found = re.findall(r"(?:RAY_VERSION=|rayVersion: \")([\d.]+)", text)
        assert set(found) <= {ray}, path
        images = re.findall(r"calprune:([\d.]+)", text)
        assert set(images) <= {metadata.version("calprune")}, path


def test_the_image_copies_all_packages_and_only_existing_files() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"COPY \S+ (.*) \./", text) for word in line.split()]
    assert all((PROJECT / name).exists() for name in copied)
    assert {"pipeline", "cluster", "jobs", "analysis"} <= set(copied)


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    run = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_no_file_opens_a_port_to_all_or_holds_a_secret() -> None:
    for path in DEPLOY.iterdir():
        text = path.read_text()
        assert "0.0.0.0" not in text, path
        assert not re.search(r"hf_[A-Za-z0-9]{8}|AKIA[A-Z0-9]{8}|password:", text), path


def test_the_dashboard_asks_only_for_metrics_that_a_run_has() -> None:
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ray_calprune_\w+", target["expr"])
    }
    rows = (PROJECT / "docs" / "running.md").read_text().splitlines()
    known = {name for row in rows for name in re.findall(r"`(ray_calprune_\w+)`", row)}
    assert len(asked) >= 8
    assert asked <= known
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
