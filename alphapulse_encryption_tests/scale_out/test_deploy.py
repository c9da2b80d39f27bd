"""What is shipped for Celery, Kubernetes and Docker: held against Dagster's own launcher and Kubernetes' own models.

The values are for Dagster's Helm chart, which is not here: the fields it takes are written down below, as its templates
read them, and what they make of the instance is rebuilt and given to Dagster.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from dagster._config import process_config, resolve_to_config_type
from dagster._core.instance.config import dagster_instance_config_schema
from dagster_k8s import K8sRunLauncher
from dagster_k8s.models import k8s_model_from_dict, k8s_snake_case_dict
from dagster_postgres import PostgresRunStorage
from kubernetes.client import models

from alphapulse_encryption.defs.resources.instance import packaged_file
from alphapulse_encryption.ui import server
from alphapulse_encryption.ui.gate import Rules

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"

pytestmark = pytest.mark.skipif(not KUBERNETES.is_dir(), reason="deploy/ is not here")

# The chart's fields, of the version of Dagster that is installed (helm/dagster/values.schema.json, and the templates).
POD = {
    *("annotations", "nodeSelector", "affinity", "tolerations", "podSecurityContext", "securityContext"),
    *("resources", "livenessProbe", "readinessProbe", "startupProbe", "labels", "volumeMounts", "volumes"),
    *("schedulerName", "env", "envConfigMaps", "envSecrets", "image"),
}
IMAGE = {"repository", "tag", "pullPolicy"}
FIELDS: dict[str, set[str]] = {
    "": {
        *("dagsterWebserver", "dagster-user-deployments", "postgresql", "generatePostgresqlPasswordSecret"),
        *("generateCeleryConfigSecret", "rabbitmq", "redis", "flower", "ingress", "imagePullSecrets"),
        *(
            "computeLogManager",
            "scheduler",
            "runLauncher",
            "pythonLogs",
            "dagsterDaemon",
            "busybox",
            "migrate",
        ),
        *("telemetry", "serviceAccount", "global", "retention", "additionalInstanceConfig", "concurrency"),
    },
    "global": {
        *("postgresqlSecretName", "dagsterHome", "serviceAccountName", "celeryConfigSecretName"),
        "dagsterInstanceConfigMap",
    },
    "serviceAccount": {"create", "name", "annotations"},
    "postgresql": {
        *(
            "postgresqlScheme",
            "image",
            "enabled",
            "postgresqlHost",
            "postgresqlUsername",
            "postgresqlPassword",
        ),
        *("postgresqlDatabase", "postgresqlParams", "service"),
    },
    "dagsterWebserver": POD
    | {
        *("replicaCount", "nameOverride", "pathPrefix", "service", "workspace", "deploymentLabels"),
        *("enableReadOnly", "dbStatementTimeout", "dbPoolRecycle", "logLevel", "initContainerResources"),
    },
    "dagsterWebserver.service": {"type", "port", "annotations"},
    "dagsterDaemon": POD
    | {
        *(
            "enabled",
            "runCoordinator",
            "heartbeatTolerance",
            "deploymentLabels",
            "runMonitoring",
            "runRetries",
        ),
        *("sensors", "schedules", "initContainerResources"),
    },
    "dagsterDaemon.runCoordinator": {"enabled", "type", "config"},
    "dagsterDaemon.runCoordinator.config": {"queuedRunCoordinator", "customRunCoordinator"},
    "dagsterDaemon.runCoordinator.config.queuedRunCoordinator": {
        *("maxConcurrentRuns", "tagConcurrencyLimits", "dequeueIntervalSeconds", "dequeueNumWorkers"),
        *("dequeueUseThreads", "blockOpConcurrencyLimitedRuns"),
    },
    "dagsterDaemon.runMonitoring": {
        *("enabled", "startTimeoutSeconds", "cancelTimeoutSeconds", "maxResumeRunAttempts"),
        *("pollIntervalSeconds", "freeSlotsAfterRunEndSeconds", "maxRuntimeSeconds"),
    },
    "runLauncher": {"type", "config"},
    "runLauncher.config": {"celeryK8sRunLauncher", "k8sRunLauncher", "customRunLauncher"},
    "runLauncher.config.k8sRunLauncher": {
        *(
            "image",
            "imagePullPolicy",
            "jobNamespace",
            "loadInclusterConfig",
            "kubeconfigFile",
            "envConfigMaps",
        ),
        *("envSecrets", "envVars", "volumeMounts", "volumes", "labels", "failPodOnRunFailure", "resources"),
        *("schedulerName", "securityContext", "runK8sConfig"),
    },
    "runLauncher.config.k8sRunLauncher.runK8sConfig": {
        *("containerConfig", "podSpecConfig", "podTemplateSpecMetadata", "jobSpecConfig", "jobMetadata"),
    },
    "dagster-user-deployments": {"enabled", "enableSubchart", "imagePullSecrets", "deployments"},
    "computeLogManager": {"type", "config"},
    "telemetry": {"enabled"},
    "retention": {"enabled", "schedule", "sensor", "autoMaterialize"},
}
DEPLOYMENT = POD | {
    *("name", "dagsterApiGrpcArgs", "codeServerArgs", "includeConfigInLaunchedRuns", "port"),
}


def model(kind: Any, manifest: Mapping[str, Any]) -> Any:
    """Kubernetes' own model of a manifest, which knows its fields and their types."""
    return k8s_model_from_dict(kind, k8s_snake_case_dict(kind, manifest))


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((KUBERNETES / "values.yaml").read_text())
    return found


def at(values: Mapping[str, Any], path: str) -> Any:
    for name in path.split(".") if path else ():
        values = values[name]
    return values


def test_the_chart_knows_every_field(values: dict[str, Any]) -> None:
    for path, fields in FIELDS.items():
        assert set(at(values, path)) <= fields, path
    for deployment in values["dagster-user-deployments"]["deployments"]:
        assert set(deployment) <= DEPLOYMENT
        assert set(deployment["image"]) == IMAGE
    names = [d["name"] for d in values["dagster-user-deployments"]["deployments"]]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names)


def pods(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "webserver", values["dagsterWebserver"]
    yield "daemon", values["dagsterDaemon"]
    yield "code server", values["dagster-user-deployments"]["deployments"][0]


def test_kubernetes_knows_what_pods_get(values: dict[str, Any]) -> None:
    for name, pod in pods(values):
        context = model(models.V1PodSecurityContext, pod["podSecurityContext"])
        container = model(models.V1SecurityContext, pod["securityContext"])
        assert (context.run_as_non_root, context.run_as_user) == (True, 10001), name
        assert (container.allow_privilege_escalation, container.read_only_root_filesystem) == (False, True)
        assert container.capabilities.drop == ["ALL"]
        resources = model(models.V1ResourceRequirements, pod["resources"])
        assert {"cpu", "memory"} <= set(resources.requests) and "memory" in resources.limits
        mounts = [model(models.V1VolumeMount, mount) for mount in pod["volumeMounts"]]
        volumes = [model(models.V1Volume, volume) for volume in pod["volumes"]]
        assert {mount.name for mount in mounts} == {volume.name for volume in volumes}
        # The root file system is read-only: what is written needs a place.
        assert {mount.mount_path for mount in mounts} == {"/var/lib/alphapulse", "/tmp"}


def instance_configuration(values: dict[str, Any]) -> dict[str, Any]:
    """What the chart's templates write into `dagster.yaml`."""
    launcher = dict(values["runLauncher"]["config"]["k8sRunLauncher"])
    image = launcher["image"]
    monitoring = values["dagsterDaemon"]["runMonitoring"]
    queue = values["dagsterDaemon"]["runCoordinator"]["config"]["queuedRunCoordinator"]
    run_k8s_config = {
        re.sub("([A-Z])", lambda found: "_" + found[0].lower(), name): text
        for name, text in launcher["runK8sConfig"].items()
    }
    written = {
        "run_launcher": {
            "module": "dagster_k8s",
            "class": "K8sRunLauncher",
            "config": {
                "load_incluster_config": launcher["loadInclusterConfig"],
                "job_namespace": "alphapulse",
                "image_pull_policy": launcher["imagePullPolicy"],
                "service_account_name": values["global"]["serviceAccountName"],
                "job_image": f"{image['repository']}:{image['tag']}",
                "dagster_home": values["global"]["dagsterHome"],
                "instance_config_map": "dagster-instance",
                "postgres_password_secret": values["global"]["postgresqlSecretName"],
                "env_secrets": [secret["name"] for secret in launcher["envSecrets"]],
                "env_vars": launcher["envVars"],
                "volumes": launcher["volumes"],
                "volume_mounts": launcher["volumeMounts"],
                "resources": launcher["resources"],
                "security_context": launcher["securityContext"],
                "run_k8s_config": run_k8s_config,
            },
        },
        "run_coordinator": {
            "module": "dagster.core.run_coordinator",
            "class": "QueuedRunCoordinator",
            "config": {
                "max_concurrent_runs": queue["maxConcurrentRuns"],
                "tag_concurrency_limits": queue["tagConcurrencyLimits"],
                "dequeue_interval_seconds": queue["dequeueIntervalSeconds"],
            },
        },
        "run_monitoring": {
            "enabled": monitoring["enabled"],
            "start_timeout_seconds": monitoring["startTimeoutSeconds"],
            "cancel_timeout_seconds": monitoring["cancelTimeoutSeconds"],
            "max_resume_run_attempts": monitoring["maxResumeRunAttempts"],
            "poll_interval_seconds": monitoring["pollIntervalSeconds"],
            "free_slots_after_run_end_seconds": monitoring["freeSlotsAfterRunEndSeconds"],
        },
        "telemetry": values["telemetry"],
    }
    more = values["additionalInstanceConfig"]
    assert not written.keys() & more.keys()
    return {**written, **more}


def test_dagster_takes_the_instance(values: dict[str, Any]) -> None:
    configuration = instance_configuration(values)
    result = process_config(resolve_to_config_type(dagster_instance_config_schema()), configuration)
    assert result.success, result.errors
    # As in our own: what failed for a reason is not run again by itself, and least of all what destroys.
    ours = yaml.safe_load(packaged_file("dagster-celery.yaml").read_text())
    assert configuration["run_retries"] == ours["run_retries"]
    assert configuration["run_monitoring"]["max_resume_run_attempts"] == 0
    assert configuration["concurrency"]["pools"] == ours["concurrency"]["pools"]
    assert values["dagsterDaemon"]["runRetries"] == {"enabled": False}
    assert values["computeLogManager"]["type"] == "NoOpComputeLogManager"

    launcher = configuration["run_launcher"]["config"]
    schema = K8sRunLauncher.config_type()  # type: ignore[no-untyped-call]
    result = process_config(resolve_to_config_type(schema), launcher)
    assert result.success, result.errors
    # What it makes of a run's job is checked by Kubernetes' models as it is built.
    run = launcher["run_k8s_config"]
    model(
        models.V1PodSpec,
        {"containers": [], **{name: text for name, text in run["pod_spec_config"].items()}},
    )
    model(models.V1ObjectMeta, run["pod_template_spec_metadata"])
    job = model(models.V1JobSpec, {**run["job_spec_config"], "template": {}})
    # Kubernetes would begin a run anew that Dagster has given up.
    assert job.backoff_limit == 0


def test_the_storage_is_reached_by_the_driver_that_dagster_needs(values: dict[str, Any]) -> None:
    given = values["postgresql"]
    config = {
        "postgres_db": {
            "username": given["postgresqlUsername"],
            "password": "in the test",
            "hostname": given["postgresqlHost"],
            "db_name": given["postgresqlDatabase"],
            "port": given["service"]["port"],
            "params": given["postgresqlParams"],
            "scheme": given["postgresqlScheme"],
        }
    }
    result = process_config(resolve_to_config_type(PostgresRunStorage.config_type()), config)
    assert result.success, result.errors
    from dagster_postgres.utils import pg_url_from_config

    assert pg_url_from_config(config).startswith("postgresql+psycopg2://dagster:")
    assert given["postgresqlParams"]["sslmode"] == "verify-full"


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((KUBERNETES / name).read_text()) if document]


def test_the_operators_pod(values: dict[str, Any]) -> None:
    (manifest,) = documents("operator.yaml")
    deployment = model(models.V1Deployment, manifest)
    pod = deployment.spec.template
    assert deployment.spec.selector.match_labels.items() <= pod.metadata.labels.items()
    (container,) = pod.spec.containers
    image = values["runLauncher"]["config"]["k8sRunLauncher"]["image"]
    assert container.image == f"{image['repository']}:{image['tag']}"
    runs = values["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]["podSpecConfig"]
    assert pod.spec.service_account_name == runs["serviceAccountName"]
    assert {mount.name for mount in container.volume_mounts} == {volume.name for volume in pod.spec.volumes}
    environment = {entry.name: entry.value for entry in container.env}
    assert environment["DAGSTER_CURRENT_IMAGE"] == container.image
    # It launches runs with the very settings that they get.
    for setting in values["runLauncher"]["config"]["k8sRunLauncher"]["envVars"]:
        name, _, text = setting.partition("=")
        assert environment[name] == text
        assert values["dagster-user-deployments"]["deployments"][0]["env"][name] == text
    assert pod.spec.security_context.run_as_non_root


def test_what_serves_the_network_has_neither_the_target_nor_the_identity_that_reads_the_key(
    values: dict[str, Any],
) -> None:
    for name in ("dagsterWebserver", "dagsterDaemon"):
        assert not {"envSecrets", "envConfigMaps"} & values[name].keys()
    runs = values["runLauncher"]["config"]["k8sRunLauncher"]["runK8sConfig"]["podSpecConfig"]
    (account,) = documents("service-account.yaml")
    named = model(models.V1ServiceAccount, account).metadata.name
    assert named == runs["serviceAccountName"] != values["global"]["serviceAccountName"]
    assert "annotations" not in values["serviceAccount"]


def test_the_chart_starts_the_web_server_behind_its_gate(values: dict[str, Any]) -> None:
    """By the image's own `dagster-webserver`, with the options of the chart's template."""
    (script,) = [text for name, text in instructions() if name == "RUN" and "dagster-webserver" in text]
    made = subprocess.run(
        ["sh", "-c", script.partition("> ")[0]], capture_output=True, text=True, check=True
    ).stdout
    compile(made, "dagster-webserver", "exec")
    assert made.startswith("#!/opt/alphapulse/bin/python\n") and "ui.server import main" in made
    assert script.partition("> ")[2].split()[0] == "/opt/alphapulse/bin/dagster-webserver"
    command = (
        "-h 0.0.0.0 -p 80 -w /dagster-workspace/workspace.yaml --db-statement-timeout 1 --db-pool-recycle 2 "
        "--db-pool-max-overflow 3 --path-prefix /dagster --log-level info --read-only"
    )
    options = server.build_parser().parse_args(command.split())
    assert (options.host, options.port, options.workspace) == (
        "0.0.0.0",
        80,
        ["/dagster-workspace/workspace.yaml"],
    )
    assert (options.path_prefix, options.read_only, options.log_level) == ("/dagster", True, "info")
    assert (options.db_statement_timeout, options.db_pool_recycle, options.db_pool_max_overflow) == (1, 2, 3)
    # The probe asks under a name that is let in.
    probe = model(models.V1Probe, values["dagsterWebserver"]["readinessProbe"])
    (header,) = probe.http_get.http_headers
    assert header.name == "Host" and Rules().knows(header.value)
    assert (
        probe.http_get.path == "/server_info"
        and probe.http_get.port == values["dagsterWebserver"]["service"]["port"]
    )


def test_network_policies() -> None:
    policies = [model(models.V1NetworkPolicy, found) for found in documents("network-policy.yaml")]
    everything, *others = policies
    assert everything.spec.policy_types == ["Ingress", "Egress"]
    assert not everything.spec.ingress and not everything.spec.egress
    assert len({policy.metadata.name for policy in policies}) == len(policies)
    for policy in others:
        rules = [*(policy.spec.ingress or []), *(policy.spec.egress or [])]
        assert rules
        # Nothing is open to everybody, and no port is left out.
        for rule in rules:
            assert (getattr(rule, "_from", None) or getattr(rule, "to", None)) and rule.ports
            for peer in getattr(rule, "_from", None) or rule.to:
                assert peer.ip_block is None or not peer.ip_block.cidr.endswith("/0")


def test_secrets_are_named_and_never_there(values: dict[str, Any]) -> None:
    used = {
        values["global"]["postgresqlSecretName"],
        *(s["name"] for s in values["runLauncher"]["config"]["k8sRunLauncher"]["envSecrets"]),
        *(s["name"] for s in values["dagster-user-deployments"]["deployments"][0]["envSecrets"]),
    }
    external = documents("external-secret.yaml")
    assert {found["spec"]["target"]["name"] for found in external} == used
    (provider,) = documents("secret-provider-class.yaml")
    assert {found["secretName"] for found in provider["spec"]["secretObjects"]} == used
    objects = {found["objectName"] for found in yaml.safe_load(provider["spec"]["parameters"]["objects"])}
    made = {d["objectName"] for found in provider["spec"]["secretObjects"] for d in found["data"]}
    assert made == objects
    keys = {d["secretKey"] for found in external for d in found["spec"]["data"]}
    assert keys == {d["key"] for found in provider["spec"]["secretObjects"] for d in found["data"]}
    assert keys == {"ALPHAPULSE_DATABASE_URL", "ALPHAPULSE_WRITER_DATABASE_URL", "postgresql-password"}
    # Neither a key nor an address of a database stands anywhere.
    for path in sorted((ROOT / "deploy").rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            text = path.read_text()
            assert "ALPHAPULSE_ENCRYPTION_MASTER_KEY" not in text, path
            assert not re.search(r"postgres(ql)?(\+\w+)?://\S+@", text), path
            assert not re.search(r"(?i)password:\s*\S", text), path


# The image.


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions, continued lines put together."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(line.split()[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


def test_the_dockerfile() -> None:
    found = instructions()
    froms = [number for number, (name, _) in enumerate(found) if name == "FROM"]
    assert len(froms) == 2 and found[froms[0]][1].endswith(" AS build")
    last = dict(found[froms[1] :])
    assert last["USER"] == "10001:10001"
    assert [name for name, _ in found[froms[1] :]].index("USER") > max(
        number for number, (name, _) in enumerate(found[froms[1] :]) if name in {"RUN", "COPY"}
    )
    arguments = [text for name, text in found if name in {"ARG", "ENV"}]
    assert not [text for text in arguments if re.search(r"(?i)secret|token|passw|key", text)]
    # Nothing but what is locked, by its hash; and ours.
    installs = [
        command
        for name, text in found
        if name == "RUN"
        for command in map(shlex.split, re.split(r"&&", text))
        if "install" in command and "pip" in command
    ]
    assert len(installs) == 3
    for command in installs:
        assert "--require-hashes" in command or {"--no-deps", "--no-index"} <= set(command)
    assert not [name for name, _ in found if name == "ADD"]


def test_what_is_copied_into_the_image_is_there_and_not_ignored() -> None:
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert ignored[0] == "*"
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    copied = [
        source
        for name, text in instructions()
        if name == "COPY" and "--from" not in text
        for source in text.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(source == name or source.startswith(f"{name}/") for name in allowed), source


def test_the_images_versions_are_those_that_are_tested() -> None:
    def versions(name: str) -> dict[str, str]:
        lines = (ROOT / name).read_text().splitlines()
        return dict(
            re.split(r"==|\[.*\]==", line.split(" ")[0])
            for line in lines
            if re.match(r"[A-Za-z0-9]\S*==", line)
        )

    tested = versions("requirements.lock")
    for name in ("deploy/docker/requirements.lock", "deploy/docker/build.lock"):
        found = versions(name)
        assert found.items() <= tested.items(), name
    shipped = versions("deploy/docker/requirements.lock")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*declared["dependencies"]]
    for extra in ("s3", "aws", "vault", "celery", "kubernetes"):
        wanted += declared["optional-dependencies"][extra]
    for requirement in wanted:
        name = re.split(r"[\[<>=]", requirement)[0].lower().replace("_", "-")
        assert name in shipped, requirement
    assert not {"pytest", "moto", "selenium", "mypy"} & shipped.keys()


@pytest.mark.long
def test_the_images_steps_work(tmp_path: Path) -> None:
    builder, target = tmp_path / "builder", tmp_path / "target"
    for name in (builder, target):
        subprocess.run([sys.executable, "-m", "venv", str(name)], check=True)
    for _, text in instructions():
        for command in map(shlex.split, re.split(r"&&", text)):
            if "pip" not in command:
                continue
            moved = [
                part.replace("/opt/builder", str(builder)).replace("/opt/alphapulse", str(target))
                for part in command
            ]
            moved = [
                str(ROOT / "deploy" / "docker" / part) if part.endswith(".lock") else part for part in moved
            ]
            moved = [str(tmp_path / "dist") if part == "dist" else part for part in moved]
            moved = [
                str(next((tmp_path / "dist").glob("*.whl"))) if part == "dist/*.whl" else part
                for part in moved
            ]
            subprocess.run(moved, check=True, cwd=ROOT, capture_output=True)
    shown = subprocess.run(
        [target / "bin" / "python", "-m", "alphapulse_encryption", "--help"],
        check=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "--migrate-data" in shown.stdout
    for module in (
        "alphapulse_encryption.scale_out.worker",
        "dagster_k8s",
        "dagster_celery",
        "hvac",
        "boto3",
    ):
        subprocess.run([target / "bin" / "python", "-c", f"import {module}"], check=True, cwd=tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "alphapulse_encryption/defs/resources/dagster-celery.yaml" in names


def test_the_celery_configuration_is_the_packaged_one() -> None:
    shipped = ROOT / "deploy" / "celery" / "dagster.yaml"
    assert shipped.read_bytes() == packaged_file("dagster-celery.yaml").read_bytes()
    service = (ROOT / "deploy" / "celery" / "worker.service").read_text()
    assert "ExecStart=/opt/alphapulse/bin/python -m alphapulse_encryption.scale_out.worker" in service
    assert not re.search(r"://", service)
