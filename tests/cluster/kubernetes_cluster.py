"""A real Kubernetes for tests, started by the scripts that `PERCH_KUBE_SCRIPTS` names, and ended by them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from pipelines.release.targets import Slot

PROJECT = Path(__file__).parents[2]
SCRIPTS = Path(os.environ.get("PERCH_KUBE_SCRIPTS", PROJECT.parent / "shared/kube"))
_CACHE = Path(os.environ.get("K8S_CACHE", Path.home() / ".cache/perch-kube"))
PROGRAM, IMAGES = _CACHE / "bin/hyperkube", _CACHE / "images"
HOST_SEEN_FROM_PODS = "10.199.0.1"

HTTP_ROUTES = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "httproutes.gateway.networking.k8s.io",
        "annotations": {"api-approved.kubernetes.io": "unapproved, without a schema: for tests alone"},
    },
    "spec": {
        "group": "gateway.networking.k8s.io",
        "scope": "Namespaced",
        "names": {"plural": "httproutes", "singular": "httproute", "kind": "HTTPRoute"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}


def why_not() -> str:
    """Why no cluster can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "a node needs root"
    if not (SCRIPTS / "up.sh").is_file():
        return f"{SCRIPTS} has no up.sh: name the folder by PERCH_KUBE_SCRIPTS"
    if not PROGRAM.exists():
        return f"{_CACHE} holds no Kubernetes: {SCRIPTS}/build.sh makes one"
    return ""


class Cluster:
    """A cluster of one node, or a control plane alone.

    Args:
        run: new folder for its state.
        node: whether pods are to run.
    """

    def __init__(self, run: Path, *, node: bool) -> None:
        self.run, self.has_node = run, node
        self.inits: dict[str, int] = {}  # of each node: the process whose end ends all in its namespaces
        self.environment = {**os.environ, "K8S_RUN": str(run)}
        if not node:  # beside another one; each takes a few ports in a row, out of the range that the kernel gives away
            self.environment |= {"K8S_PORT": "18443", "K8S_ETCD_PORT": "18379"}

    @property
    def kubeconfig(self) -> Path:
        return self.run / "admin.kubeconfig"

    def start(self) -> None:
        mode = "node" if self.has_node else "cp"
        done = subprocess.run(
            ["bash", str(SCRIPTS / "up.sh"), mode], env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"up.sh {mode}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
        if self.has_node:
            self.inits["node1"] = int((self.run / "pids/nodeinit").read_text())
        self.apply([HTTP_ROUTES])
        self.kubectl("wait", "--for=condition=Established", f"crd/{HTTP_ROUTES['metadata']['name']}", "--timeout=30s")

    def stop(self) -> None:
        subprocess.run(["bash", str(SCRIPTS / "down.sh")], env=self.environment, check=False, capture_output=True)

    def kubectl(self, *words: str, given: str | None = None, check: bool = True) -> str:
        done = subprocess.run(
            [shutil.which("kubectl") or "kubectl", *words],
            env={**self.environment, "KUBECONFIG": str(self.kubeconfig)},
            input=given,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"kubectl {' '.join(words)}: {done.stderr}")
        return done.stdout

    def read(self, *words: str) -> Any:
        return json.loads(self.kubectl("get", *words, "--output=json"))

    def apply(self, documents: Iterable[dict[str, Any]]) -> None:
        listed = {"apiVersion": "v1", "kind": "List", "items": list(documents)}
        self.kubectl("apply", "--validate=false", "--filename=-", given=json.dumps(listed))

    def kubeconfig_of(self, namespace: str, account: str) -> Path:
        """A kubeconfig of a service account, which may do what its Roles say."""
        token = self.kubectl("create", "token", account, f"--namespace={namespace}", "--duration=24h").strip()
        tree = yaml.safe_load(self.kubeconfig.read_text())
        tree["users"] = [{"name": user["name"], "user": {"token": token}} for user in tree["users"]]
        (file := self.run / f"{namespace}-{account}.kubeconfig").write_text(yaml.safe_dump(tree))
        return file

    def server_of(self, namespace: str, slot: Slot) -> str:
        """The letter of the server that a release slot is in, as the route says."""
        route = self.read("httproute", "perch-serving", f"--namespace={namespace}")
        return str(route["metadata"]["annotations"][f"perch/{slot}"])

    def load_image(self, archive: Path, node: str = "node1") -> None:
        """Give an image to a node, from a Docker archive."""
        words = ["ctr", "--namespace=k8s.io", "images", "import", str(archive)]
        subprocess.run([*inside(self.inits[node]), *words], check=True, capture_output=True)


def inside(init: int) -> list[str]:
    """What a command begins with that is to run where this process does, in a node's namespaces."""
    return ["nsenter", f"--target={init}", "--net", "--mount", "--pid"]
