"""The few calls of the Kubernetes API that the target needs, on plain documents, with its failures put into words."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import TryLater

FIELD_MANAGER = "perch-engine"
DEPLOYMENTS = "apis/apps/v1"
ROUTES = "apis/gateway.networking.k8s.io/v1"
CORE = "api/v1"

_ASK_LIMIT_S = 3.0
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_APPLY = "application/apply-patch+yaml"


class Conflict(TryLater):
    """Somebody else has written the object since it was read."""


class ClusterApi:
    """One namespace of a cluster, by the rules of the official client: a pod's own account, else the kubeconfig.

    Args:
        namespace: empty takes the pod's own, else that of the kubeconfig's context, else `default`.
        kubeconfig: a file instead, whoever asks.

    Attributes:
        namespace: that is used.
    """

    def __init__(self, namespace: str = "", kubeconfig: str = "") -> None:
        from kubernetes.client import ApiClient, Configuration
        from urllib3 import Retry

        configuration = Configuration()
        own = _load(configuration, kubeconfig)
        self.namespace = namespace or own or "default"
        # A kept connection may have been closed.  A write names the version that it changes, so that a second one after
        # a lost answer is a conflict, and what is there by then is looked at first.
        configuration.retries = Retry(2, backoff_factor=0.1, allowed_methods=None, status=0, redirect=0)
        self._client = ApiClient(configuration)

    def get(self, group: str, kind: str, name: str) -> dict[str, Any]:
        """An object.

        Raises:
            TryLater: it is not there, or the API does not answer.
        """
        return self._json("GET", f"/{group}/namespaces/{self.namespace}/{kind}/{name}")

    def list_pods(self, selector: str) -> list[dict[str, Any]]:
        """Pods by their labels.

        Raises:
            TryLater: the API does not answer.
        """
        path = f"/{CORE}/namespaces/{self.namespace}/pods"
        pods = self._tree("GET", path, [("labelSelector", selector)]).get("items")
        if not isinstance(pods, list) or not all(isinstance(pod, dict) and _is_object(pod) for pod in pods):
            raise self._explain(0, "its answer is no list of pods", f"GET {path}")
        return pods

    def apply(self, group: str, kind: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Server-side apply, as the owner of what the document names; `resourceVersion` in it must be the present one.

        Raises:
            Conflict: it is not.
            TryLater: the API does not answer, or does not take it.
        """
        path = f"/{group}/namespaces/{self.namespace}/{kind}/{document['metadata']['name']}"
        return self._json("PATCH", path, [("fieldManager", FIELD_MANAGER), ("force", "true")], document)

    def read_log(self, pod: str, container: str, *, previous: bool, lines: int) -> str:
        """The last lines of a container; empty where there are none any more, or nobody tells."""
        query = [("container", container), ("tailLines", str(lines)), ("previous", str(previous).lower())]
        try:
            return self._call("GET", f"/{CORE}/namespaces/{self.namespace}/pods/{pod}/log", query).decode(
                errors="replace"
            )
        except TryLater:
            return ""

    def _json(
        self, method: str, path: str, query: list[tuple[str, str]] | None = None, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        tree = self._tree(method, path, query, body)
        if not _is_object(tree):
            raise self._explain(0, "its answer is no object of Kubernetes", f"{method} {path}")
        return tree

    def _tree(
        self, method: str, path: str, query: list[tuple[str, str]] | None = None, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """What was answered; a proxy before an API server that is away may answer with anything."""
        try:
            tree = json.loads(self._call(method, path, query, body))
        except ValueError as error:
            raise self._explain(0, f"its answer is no JSON: {error}", f"{method} {path}") from error
        if not isinstance(tree, dict):
            raise self._explain(0, "its answer is no JSON object", f"{method} {path}")
        return tree

    def _call(
        self, method: str, path: str, query: list[tuple[str, str]] | None = None, body: Mapping[str, Any] | None = None
    ) -> bytes:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json, */*"}
        if body is not None:
            headers["Content-Type"] = _APPLY
        try:
            response = self._client.call_api(
                path,
                method,
                query_params=query or [],
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=_ASK_LIMIT_S,
            )
            data: bytes = response.data
        except ApiException as error:
            raise self._explain(error.status, _message(error), f"{method} {path}") from error
        except (HTTPError, OSError) as error:
            raise self._explain(0, str(error), f"{method} {path}") from error
        return data

    def _explain(self, status: int, message: str, call: str) -> TryLater:
        """Why a call failed; never a refusal, for it says nothing against the release that is being moved."""
        if status == 409:
            return Conflict(f"{call}: somebody else has changed it meanwhile\n  what to do: try again")
        host = self._client.configuration.host
        if status in {401, 403}:
            what = "the Role of this account, see docs/reference/kubernetes-target.md"
        elif status == 404:
            what = (
                "install the chart helm/perch; PERCH_KUBERNETES_NAMESPACE and PERCH_KUBERNETES_RELEASE say where it is"
            )
        else:
            what = "see that the API server is up, then try again; traffic goes where it went"
        return TryLater(f"Kubernetes at {host}: {call}: {status or 'no answer'}: {message}\n  what to do: {what}")


def _load(configuration: Any, kubeconfig: str) -> str:
    """Fill in where the cluster is and who asks; the namespace that goes with it."""
    from kubernetes import config

    try:
        if not kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(client_configuration=configuration)
            return _NAMESPACE_FILE.read_text(encoding="utf-8").strip()
        file = kubeconfig or os.environ.get("KUBECONFIG") or None  # the client reads the variable at its import alone
        config.load_kube_config(file, client_configuration=configuration)
        _, context = config.list_kube_config_contexts(file)
    except (config.ConfigException, OSError) as error:
        raise TryLater(
            f"there is no way to a cluster: {error}\n"
            "  what to do: run it in a pod with an account, or name a kubeconfig by KUBECONFIG"
        ) from error
    return str(context.get("context", {}).get("namespace", ""))


def _is_object(tree: Mapping[str, Any]) -> bool:
    metadata = tree.get("metadata")
    return isinstance(metadata, dict) and isinstance(metadata.get("name"), str)


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)
