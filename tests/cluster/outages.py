"""Parts of Kubernetes that are killed, and a node that is drained, for the time of a block."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from pipelines.release.targets import Slot
from tests.cluster.kubernetes_cluster import Cluster
from tests.integration.release_target_behaviour import wait_until

PROBED_AGAIN_S = 40.0  # 3 s without requests; how soon it gets there depends on what else the machine does
ON_THE_NODE = ("kubelet", "containerd")  # the others run beside it


@contextmanager
def killed(cluster: Cluster, program: str) -> Iterator[None]:
    """A part of Kubernetes is killed, and started again as it was when the block ends."""
    process = next(
        known
        for known in psutil.process_iter(["cmdline"])
        if program in (known.info["cmdline"] or [])[:2] and known.cwd() == str(cluster.run)
    )
    command, folder, environment = process.cmdline(), process.cwd(), process.environ()
    process.kill()
    try:
        # It stays as a zombie until whoever started it looks.
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 10)
        yield
    finally:
        if program in ON_THE_NODE:
            # In the node's namespaces, where containerd's socket, the pods' mounts and their network are.
            node = (cluster.run / "pids/nodeinit").read_text().strip()
            inside = ["nsenter", "--target", node, "--net", "--mount", "--pid"]
            command = [*inside, "sh", "-c", 'cd "$0" && exec "$@"', folder, *command]
        with (cluster.run / f"log/{program}.again.log").open("ab") as log:
            again = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if program not in ON_THE_NODE:  # these end with the node
            (cluster.run / "pids" / program.removeprefix("kube-")).write_text(str(again.pid))


@contextmanager
def drained_node(cluster: Cluster, limit_s: int) -> Iterator[str]:
    """Drain the node, as far as budgets let that; it takes pods again when the block ends.  Yields what was said."""
    (node,) = cluster.kubectl("get", "nodes", "--output=name").split()
    name = node.partition("/")[2]
    words = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", f"--timeout={limit_s}s")
    try:
        done = subprocess.run(
            ["kubectl", "drain", name, *words],
            env={**cluster.environment, "KUBECONFIG": str(cluster.kubeconfig)},
            capture_output=True,
            text=True,
            check=False,
        )
        yield done.stdout + done.stderr
    finally:
        cluster.kubectl("uncordon", name)


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
