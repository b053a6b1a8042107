"""What the pods of steps look like: what they ask for, where they may run, and what they may do there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kubernetes.client import models as k8s

from pipelines.errors import Refusal
from pipelines.params import PodsParams
from pipelines.settings import Settings

if TYPE_CHECKING:
    from airflow.sdk import Context

LABELS = {
    "app.kubernetes.io/name": "perch",
    "app.kubernetes.io/component": "pipeline",
    "app.kubernetes.io/part-of": "perch",
    "app.kubernetes.io/managed-by": "airflow",
}
ENGINE_STEPS = {"deploy_to_staging"}  # they speak to the cluster, as the engine does
_SIGNING_STEPS = {"model_packaging", "deploy_to_staging"}
_USER = 10001  # of the images
_HOME = "/var/lib/perch"
_KEYS = "/etc/perch/keys"
_STAGING_KEY = "PERCH_STAGING_API_KEY"
_STORE_CA = "/etc/perch/object-store-ca"


def require_pod_settings(settings: Settings) -> None:
    """Refuse to make pods that could not start, or would leave nothing behind.

    Raises:
        Refusal: the image or the bucket is not named.
    """
    for variable, value, why in (
        ("PERCH_PIPELINE_IMAGE", settings.pipeline_image, "the image of the steps' pods"),
        ("PERCH_RUNS_URL", settings.runs_url, "the s3://bucket/prefix that runs go through from pod to pod"),
    ):
        if not value:
            raise Refusal(variable, "is empty", limit=why, way_out="set it, or set PERCH_RUNNER=local")


def pod_template(step: str, wanted: PodsParams, settings: Settings) -> k8s.V1Pod:
    """A pod as Pod Security's `restricted` has it, on a read-only root file system, without a word of its command.

    Args:
        step: whose pod it is.
        wanted: what the step asks for.
        settings: name what the pod gets by reference.
    """
    signs = step in _SIGNING_STEPS and bool(settings.pod_signing_secret)
    volumes = {
        "home": (_HOME, k8s.V1EmptyDirVolumeSource(size_limit=f"{wanted.disk_mib}Mi")),
        "tmp": ("/tmp", k8s.V1EmptyDirVolumeSource(size_limit="4Gi")),  # noqa: S108 - the pod's own
    }
    if wanted.gpus > 1:  # NCCL's processes meet in shared memory, of which a container has 64 MiB
        volumes["shm"] = ("/dev/shm", k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit="1Gi"))  # noqa: S108
    given = {}  # read-only, by reference
    if signs:
        keys = k8s.V1SecretVolumeSource(secret_name=settings.pod_signing_secret, default_mode=0o440)
        given["keys"] = (_KEYS, {"secret": keys})
    if settings.pod_ca_config_map:
        authorities = k8s.V1ConfigMapVolumeSource(
            name=settings.pod_ca_config_map, items=[k8s.V1KeyToPath(key="ca.crt", path="ca.crt")]
        )
        given["object-store-ca"] = (_STORE_CA, {"config_map": authorities})
    container = k8s.V1Container(
        name="base",
        env=[
            *_environment(wanted, signs=signs, has_ca=bool(settings.pod_ca_config_map)),
            *(
                _staging_key(settings.pod_staging_secret)
                if step in ENGINE_STEPS and settings.pod_staging_secret
                else ()
            ),
        ],
        env_from=[
            *(
                k8s.V1EnvFromSource(config_map_ref=k8s.V1ConfigMapEnvSource(name=name))
                for name in settings.pod_config_maps.split()
            ),
            *(
                k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=name))
                for name in settings.pod_secrets.split()
            ),
        ],
        resources=_resources(wanted),
        security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            run_as_non_root=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        volume_mounts=[
            *(k8s.V1VolumeMount(name=name, mount_path=path) for name, (path, _) in volumes.items()),
            *(k8s.V1VolumeMount(name=name, mount_path=path, read_only=True) for name, (path, _) in given.items()),
        ],
    )
    return k8s.V1Pod(
        metadata=k8s.V1ObjectMeta(),
        spec=k8s.V1PodSpec(
            containers=[container],
            enable_service_links=False,  # a Service perch-mlflow would set PERCH_MLFLOW_PORT, a setting
            image_pull_secrets=[k8s.V1LocalObjectReference(name=name) for name in settings.pod_pull_secrets.split()],
            node_selector=dict(label.split("=", 1) for label in wanted.node_selector),
            tolerations=[_toleration(taint) for taint in wanted.tolerations],
            security_context=k8s.V1PodSecurityContext(
                run_as_non_root=True,
                run_as_user=_USER,
                run_as_group=_USER,
                fs_group=_USER,
                seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
            ),
            volumes=[
                *(k8s.V1Volume(name=name, empty_dir=source) for name, (_, source) in volumes.items()),
                *(k8s.V1Volume(name=name, **source) for name, (_, source) in given.items()),
            ],
        ),
    )


def pod_annotations(context: Context) -> dict[str, str]:
    """Whose pod it is, word for word: labels hold only what a label can."""
    task = context["ti"]
    return {
        "perch/dag-id": task.dag_id,
        "perch/run-id": task.run_id,
        "perch/task-id": task.task_id,
        "perch/map-index": str(task.map_index if task.map_index is not None else -1),
        "perch/try-number": str(task.try_number),
    }


def _environment(wanted: PodsParams, *, signs: bool, has_ca: bool) -> list[k8s.V1EnvVar]:
    own_name = k8s.V1EnvVarSource(field_ref=k8s.V1ObjectFieldSelector(field_path="metadata.name"))
    variables = {
        # A node may have more cores than the pod; weights depend on how many threads added them up.
        "OMP_NUM_THREADS": str(wanted.cpu),
        "PERCH_WORKERS": str(wanted.cpu),
        **({"PERCH_SIGNING_KEY": f"{_KEYS}/release.pem", "PERCH_SERVING_PUBLIC_KEYS": _KEYS} if signs else {}),
        **({"PERCH_S3_CA_BUNDLE": f"{_STORE_CA}/ca.crt"} if has_ca else {}),
    }
    return [
        k8s.V1EnvVar(name="PERCH_POD_NAME", value_from=own_name),
        *(k8s.V1EnvVar(name=name, value=value) for name, value in variables.items()),
    ]


def _staging_key(secret: str) -> list[k8s.V1EnvVar]:
    """That key alone: user code runs in other steps' pods, and the Secret may hold the prober's key, too."""
    reference = k8s.V1SecretKeySelector(name=secret, key=_STAGING_KEY)
    return [k8s.V1EnvVar(name=_STAGING_KEY, value_from=k8s.V1EnvVarSource(secret_key_ref=reference))]


def _resources(wanted: PodsParams) -> k8s.V1ResourceRequirements:
    """Requests that are limits, too: such pods are the last to be evicted, and none takes what is another's."""
    amounts = {
        "cpu": str(wanted.cpu),
        "memory": f"{wanted.memory_mib}Mi",
        "ephemeral-storage": f"{wanted.disk_mib + 4096}Mi",
        **({wanted.gpu_resource: str(wanted.gpus)} if wanted.gpus else {}),
    }
    return k8s.V1ResourceRequirements(requests=amounts, limits=dict(amounts))


def _toleration(taint: str) -> k8s.V1Toleration:
    """From `key=value:Effect`, `key:Effect` or `key`, as `kubectl taint` writes it."""
    rest, _, effect = taint.partition(":")
    key, has_value, value = rest.partition("=")
    return k8s.V1Toleration(
        key=key, operator="Equal" if has_value else "Exists", value=value or None, effect=effect or None
    )
