"""A second node for a cluster of one: own namespaces, containerd, kubelet, kube-proxy, behind the first one's network.

It is made as the scripts make the first one, from that one's files.  Packets get to it through the first node's kernel,
so that this machine's own network stays as it is; neither node's programs have a part in that.
"""

from __future__ import annotations

import base64
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import yaml

from tests.cluster.kubernetes_cluster import IMAGES, PROGRAM, Cluster, inside
from tests.integration.release_target_behaviour import wait_until

FIRST, SECOND = "node1", "node2"
_FIRST_ADDRESS = "10.199.0.2"
_NETWORK, _PODS, _PODS_OF_FIRST = "10.199.1", "10.244.1.0/24", "10.244.0.0/24"
_ADDRESS = f"{_NETWORK}.2"
_CONTROL_GROUP = "perch-node2"  # two kubelets in one would end each other's pods
_LIMIT_S = 60.0


@contextmanager
def second_node(cluster: Cluster, *archives: Path) -> Iterator[None]:
    """A node beside the first one for the block; what runs there afterwards has to move to the first one.

    Args:
        cluster: of one node.
        archives: of the images that its pods need.
    """
    parent = _begin_namespaces(cluster)
    init = _init_of(parent)
    try:
        _connect(cluster, init)
        _write_files(cluster)
        cluster.inits[SECOND] = init
        subprocess.run([*inside(init), "bash", str(cluster.run / SECOND / "init.sh")], check=True)
        wait_until(lambda: _is_ready(cluster), _LIMIT_S)
        for archive in archives:
            cluster.load_image(archive, SECOND)
        yield
        cluster.kubectl("drain", SECOND, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=90s")
    finally:
        cluster.kubectl("delete", "node", SECOND, "--wait=false", check=False)
        cluster.inits.pop(SECOND, None)
        psutil.Process(init).kill()  # and with it all that it began
        parent.wait()
        for target in (f"{_NETWORK}.0/24", _PODS):
            subprocess.run(["ip", "route", "del", target], check=False, capture_output=True)
        _remove_control_groups()


def _begin_namespaces(cluster: Cluster) -> subprocess.Popen[bytes]:
    """The parent of what holds them, which ends with the cluster, too, should nobody end it."""
    hold = "mount --make-rshared /; while [ -e pids/nodeinit ]; do sleep 1; done"
    return subprocess.Popen(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--propagation=private", "bash", "-c", hold],
        cwd=cluster.run,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _init_of(parent: subprocess.Popen[bytes]) -> int:
    """Process id of what has the namespaces, once it has them."""
    wait_until(lambda: [child.name() for child in psutil.Process(parent.pid).children()] == ["bash"], 10)
    return psutil.Process(parent.pid).children()[0].pid


def _connect(cluster: Cluster, init: int) -> None:
    first, second = (["nsenter", f"--target={one}", "--net"] for one in (cluster.inits[FIRST], init))
    here: list[str] = []
    for where, words in (
        (first, f"ip link add to-{SECOND} type veth peer name eth0 netns {init}"),
        (first, f"ip addr add {_NETWORK}.1/24 dev to-{SECOND}"),
        (first, f"ip link set to-{SECOND} up"),
        (first, f"ip route add {_PODS} via {_ADDRESS}"),
        (second, "ip link set lo up"),
        (second, f"ip addr add {_ADDRESS}/24 dev eth0"),
        (second, "ip link set eth0 up"),
        (second, f"ip route add default via {_NETWORK}.1"),
        (here, f"ip route add {_NETWORK}.0/24 via {_FIRST_ADDRESS}"),
        (here, f"ip route add {_PODS} via {_FIRST_ADDRESS}"),
    ):
        subprocess.run([*where, *words.split()], check=True, capture_output=True)


def _write_files(cluster: Cluster) -> None:
    run, folder = cluster.run, cluster.run / SECOND
    for name in ("cni", "containerd", "state", "kubelet", "varcni"):
        (folder / name).mkdir(parents=True)
    for name in ("containerd.toml", "cni/10-lab.conflist", "kubelet.yaml", "proxy.yaml"):
        text = (run / "node" / name).read_text()
        for old, new in (
            (f"{run}/node/", f"{folder}/"),
            (_PODS_OF_FIRST, _PODS),
            (f"hostnameOverride: {FIRST}", f"hostnameOverride: {SECOND}"),
        ):
            text = text.replace(old, new)
        (folder / name).write_text(text)
    with (folder / "kubelet.yaml").open("a") as file:
        file.write(f"cgroupRoot: /{_CONTROL_GROUP}\n")
    (folder / "resolv.conf").write_text((run / "node/resolv.conf").read_text())
    _write_kubeconfig(run, folder)
    kubelet = (
        f"--config={folder}/kubelet.yaml --kubeconfig={folder}/kubeconfig --root-dir={folder}/kubelet "
        "--container-runtime=remote --container-runtime-endpoint=unix:///run/containerd/containerd.sock "
        f"--hostname-override={SECOND} --node-ip={_ADDRESS} --cert-dir={folder}/kubelet/pki "
        f"--volume-plugin-dir={folder}/volplugins"
    )
    (folder / "init.sh").write_text(f"""set -e
cd {run}
sysctl -qw net.ipv4.ip_forward=1 net.bridge.bridge-nf-call-iptables=1 || true
mkdir -p /run/containerd /var/lib/cni
mount --bind {folder}/state /run/containerd
mount --bind {folder}/varcni /var/lib/cni
if ! mountpoint -q /sys/fs/cgroup/memory && [ ! -e /sys/fs/cgroup/cgroup.controllers ]; then
  mount -t tmpfs cgroup /sys/fs/cgroup
  for c in cpu cpuacct cpuset memory devices freezer blkio pids; do
    mkdir -p /sys/fs/cgroup/$c
    mount -t cgroup -o $c cgroup /sys/fs/cgroup/$c
  done
fi
for c in /sys/fs/cgroup/*/; do mkdir -p "${{c}}{_CONTROL_GROUP}"; done
for f in cpuset.mems cpuset.cpus; do
  [ ! -e /sys/fs/cgroup/cpuset/$f ] || cat /sys/fs/cgroup/cpuset/$f > /sys/fs/cgroup/cpuset/{_CONTROL_GROUP}/$f
done
setsid containerd -c {folder}/containerd.toml > log/{SECOND}-containerd.log 2>&1 < /dev/null &
for i in $(seq 100); do ctr version > /dev/null 2>&1 && break; sleep 0.1; done
for image in {IMAGES}/*.tar; do ctr -n k8s.io images import $image > /dev/null; done
setsid {PROGRAM} kubelet {kubelet} > log/{SECOND}-kubelet.log 2>&1 < /dev/null &
setsid {PROGRAM} kube-proxy --config={folder}/proxy.yaml > log/{SECOND}-proxy.log 2>&1 < /dev/null &
""")


def _write_kubeconfig(run: Path, folder: Path) -> None:
    """A node's own certificate, signed by the cluster's authority."""
    key, request, certificate = (folder / name for name in ("node.key", "node.csr", "node.crt"))
    subject = f"/O=system:nodes/CN=system:node:{SECOND}"
    authority = ("-CA", "pki/ca.crt", "-CAkey", "pki/ca.key")
    commands: tuple[list[str | Path], ...] = (
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key],
        ["openssl", "req", "-new", "-key", key, "-subj", subject, "-out", request],
        ["openssl", "x509", "-req", "-in", request, *authority, "-CAcreateserial", "-days", "2", "-out", certificate],
    )
    for words in commands:
        subprocess.run(words, cwd=run, check=True, capture_output=True)
    tree = yaml.safe_load((run / "node.kubeconfig").read_text())
    given = {
        "client-certificate-data": base64.b64encode(certificate.read_bytes()).decode(),
        "client-key-data": base64.b64encode(key.read_bytes()).decode(),
    }
    tree["users"] = [{"name": user["name"], "user": given} for user in tree["users"]]
    (file := folder / "kubeconfig").touch(mode=0o600)
    file.write_text(yaml.safe_dump(tree))


def _is_ready(cluster: Cluster) -> bool:
    path = "-o=jsonpath={.status.conditions[?(@.type=='Ready')].status}"
    return cluster.kubectl("get", "node", SECOND, path, check=False) == "True"


def _remove_control_groups() -> None:
    time.sleep(1)  # for the last process to be gone
    for controller in Path("/sys/fs/cgroup").iterdir():
        root = controller / _CONTROL_GROUP
        if root.is_dir():
            groups = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True)
            for group in (*groups, root):
                subprocess.run(["rmdir", str(group)], check=False, capture_output=True)
