"""Parts of Kubernetes that are killed, and a node that is drained, for the time of a block."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from pipelines.release.targets import Slot
from tests.cluster.kubernetes_cluster import Cluster, inside
from tests.integration.release_target_behaviour import wait_until

PROBED_AGAIN_S = 40.0  # 3 s without requests; how soon it gets there depends on what else the machine does
ON_THE_NODE = ("kubelet", "containerd")  # the others run beside it
_PID_FILES = {"kube-apiserver": "apiserver", "kube-controller-manager": "kcm"}  # of what the scripts end


@contextmanager
def killed(cluster: Cluster, program: str, node: str = "node1") -> Iterator[None]:
    """A part of Kubernetes is killed, and started again as it was when the block ends."""
    process = next(known for known in psutil.process_iter(["cmdline"]) if _is_it(known, cluster, program, node))
    command, folder, environment = process.cmdline(), process.cwd(), process.environ()
    process.kill()
    try:
        # It stays as a zombie until whoever started it looks.
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 10)
        yield
    finally:
        if program in ON_THE_NODE:
            # In the node's namespaces, where containerd's socket, the pods' mounts and their network are.
            command = [*inside(cluster.inits[node]), "sh", "-c", 'cd "$0" && exec "$@"', folder, *command]
        with (cluster.run / f"log/{program}.again.log").open("ab") as log:
            again = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if program not in ON_THE_NODE:  # these end with the node
            (cluster.run / "pids" / _PID_FILES[program]).write_text(str(again.pid))


@contextmanager
def without_control_plane(cluster: Cluster) -> Iterator[None]:
    """The API server is away for the block, for as long as that may be; it answers again when the block has ended.

    Where it is away for longer than a lease, the controllers end, too, as they do where more than one may be started:
    here they know of no other, and would call the node lost for what they had not heard meanwhile.
    """
    with killed(cluster, "kube-controller-manager"):
        with killed(cluster, "kube-apiserver"):
            yield
        wait_until(lambda: cluster.kubectl("get", "--raw=/readyz", check=False) == "ok")


def _is_it(process: psutil.Process, cluster: Cluster, program: str, node: str) -> bool:
    words = process.info["cmdline"] or []
    if program not in words[:2] or process.cwd() != str(cluster.run):
        return False
    of_second = any("node2" in word for word in words)  # its files are in a folder of that name
    return program not in ON_THE_NODE or of_second == (node == "node2")


@contextmanager
def drained_node(cluster: Cluster, limit_s: int, node: str = "node1") -> Iterator[str]:
    """Drain a node, as far as budgets let that; it takes pods again when the block ends.  Yields what was said."""
    words = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", f"--timeout={limit_s}s")
    try:
        done = subprocess.run(
            ["kubectl", "drain", node, *words],
            env={**cluster.environment, "KUBECONFIG": str(cluster.kubeconfig)},
            capture_output=True,
            text=True,
            check=False,
        )
        yield done.stdout + done.stderr
    finally:
        cluster.kubectl("uncordon", node)


def keep_one_pod(cluster: Cluster, namespace: str, *slots: Slot) -> list[str]:
    """PodDisruptionBudgets as the chart makes them, for the servers in these slots; their names."""
    servers = [cluster.server_of(namespace, slot) for slot in slots]
    budgets = [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {"name": f"keep-{server}", "namespace": namespace},
            "spec": {
                "minAvailable": 1,
                "selector": {"matchLabels": {"app.kubernetes.io/component": "serving", "perch/server": server}},
            },
        }
        for server in servers
    ]
    cluster.apply(budgets)
    names = [f"poddisruptionbudget/keep-{server}" for server in servers]
    # A budget that nobody has counted pods for yet lets none be evicted.
    wait_until(
        lambda: all(cluster.read(name, f"--namespace={namespace}")["status"].get("expectedPods") for name in names)
    )
    return names
