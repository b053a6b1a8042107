"""A gateway for tests: turns the HTTPRoute and the Services' endpoints into what a real Envoy on this machine does.

It stands for any implementation of the Gateway API.  Routes and endpoints are files that Envoy watches; once Envoy has
a route in force, that is said in the route's status, as a controller does.  One thing is more than the API asks for:
where the canary has no endpoint left, stable answers for it.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

from pipelines.core.results import write_json
from pipelines.release.envoy import bootstrap, read_config_dump, route_table
from pipelines.release.kubernetes_api import CORE, ROUTES, ClusterApi
from pipelines.release.kubernetes_route import nowhere_name, route_name
from pipelines.release.local_layout import HOST, LocalLayout, LocalPorts, SlotPorts
from pipelines.release.local_plan import PROCESSES, PRODUCTION_PROCESSES, Deployment, Plan
from pipelines.release.targets import ReleaseRef, Routing, Slot
from pipelines.services.programs import tool
from pipelines.services.stack import any_free_port
from tests.cluster.installation import RELEASE

_INTERVAL_S = 0.05
_NOTHING = ReleaseRef("", "", "", "")


class Gateway:
    """Envoy, and a thread that tells it what the cluster says.

    Args:
        folder: new, for its files.
        api: of the cluster, as an administrator.
    """

    def __init__(self, folder: Path, api: AdminApi) -> None:
        self._layout, self._api = LocalLayout(folder), api
        slots = {process: SlotPorts(1, 2) for process in PROCESSES}  # replaced by the endpoints
        self._ports = LocalPorts(any_free_port(), any_free_port(), slots)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._envoy: subprocess.Popen[bytes] | None = None
        self._version = self._looks = 0
        self._endpoints: dict[str, list[str]] = {}
        self._taken = ""

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._ports.clients}"

    def __enter__(self) -> Self:
        self._layout.routes_folder.mkdir(parents=True)
        configuration = bootstrap(self._layout, self._ports)
        for cluster in configuration["static_resources"]["clusters"]:
            if cluster["name"] in PRODUCTION_PROCESSES:
                file = self._write_endpoints(cluster["name"], [])
                del cluster["load_assignment"]
                watched = {"path": str(file), "watched_directory": {"path": str(file.parent)}}
                cluster |= {"type": "EDS", "ignore_health_on_host_removal": True}
                cluster["eds_cluster_config"] = {
                    "eds_config": {"resource_api_version": "V3", "path_config_source": watched}
                }
        write_json(self._layout.bootstrap_file, configuration)
        self._write_routes(Plan())
        self.start_envoy()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.stop_envoy()

    def start_envoy(self) -> None:
        with (self._layout.folder / "envoy.log").open("ab") as log:
            self._envoy = subprocess.Popen(
                [tool("envoy"), "--config-path", str(self._layout.bootstrap_file), "--disable-hot-restart"],
                stdout=log,
                stderr=log,
            )

    def stop_envoy(self) -> None:
        if self._envoy is not None:
            self._envoy.kill()
            self._envoy.wait()

    def _follow(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            try:
                self._look()
            except Exception as error:  # noqa: BLE001 - the API server may be away for a while, which tests do
                with (self._layout.folder / "gateway.log").open("a") as log:
                    log.write(f"{time.time():.3f} {error!r}\n")

    def _look(self) -> None:
        self._looks += 1
        # Endpoints change less often, and the API server has two cores to share with everything else.
        for process in PRODUCTION_PROCESSES if self._looks % 4 == 0 else ():
            subsets = self._api.get(CORE, "endpoints", f"{RELEASE}-{process}").get("subsets") or ()
            found = sorted(address["ip"] for subset in subsets for address in subset.get("addresses") or ())
            if found != self._endpoints.get(process):
                self._write_endpoints(process, found)
                self._endpoints[process] = found
        route = self._api.get(ROUTES, "httproutes", route_name(RELEASE))
        key = f"{route['metadata']['uid']} {route['metadata']['generation']}"
        if key == self._taken:
            return
        self._write_routes(_plan_of(route))
        self._wait_for_envoy()
        self._say_accepted(route)
        self._taken = key

    def _write_endpoints(self, process: str, addresses: list[str]) -> Path:
        folder = self._layout.folder / "endpoints" / process
        folder.mkdir(parents=True, exist_ok=True)
        self._version += 1
        hosts = [{"endpoint": {"address": {"socket_address": {"address": ip, "port_value": 3000}}}} for ip in addresses]
        assignment = {
            "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            "cluster_name": process,
            "endpoints": [{"lb_endpoints": hosts}],
        }
        return _replace(folder / "endpoints.json", {"version_info": str(self._version), "resources": [assignment]})

    def _write_routes(self, plan: Plan) -> None:
        self._version += 1
        _replace(self._layout.routes_file, _without_marks(route_table(plan, self._version)))

    def _wait_for_envoy(self) -> None:
        path = f"http://{HOST}:{self._ports.admin}/config_dump?resource=dynamic_route_configs"
        for _ in range(200):
            with urllib.request.urlopen(path, timeout=3) as answer:
                found = read_config_dump(json.load(answer))
            if found is not None and found[1] >= int(json.loads(self._layout.routes_file.read_text())["version_info"]):
                return
            time.sleep(0.01)
        raise TimeoutError("Envoy does not take the routes")

    def _say_accepted(self, route: dict[str, Any]) -> None:
        accepted = {
            "type": "Accepted",
            "status": "True",
            "reason": "Accepted",
            "message": "",
            "lastTransitionTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "observedGeneration": route["metadata"]["generation"],
        }
        parent = {"parentRef": route["spec"]["parentRefs"][0], "controllerName": "perch.test/envoy"}
        status = {"parents": [{**parent, "conditions": [accepted]}]}
        self._api.merge_status(ROUTES, "httproutes", route["metadata"]["name"], status)


class AdminApi(ClusterApi):
    """With the one call that a gateway's controller has to itself."""

    def merge_status(self, group: str, kind: str, name: str, status: dict[str, Any]) -> None:
        self._client.call_api(
            f"/{group}/namespaces/{self.namespace}/{kind}/{name}/status",
            "PATCH",
            header_params={"Content-Type": "application/merge-patch+json", "Accept": "application/json"},
            body={"status": status},
            auth_settings=["BearerToken"],
            _preload_content=False,
            _request_timeout=3,
        )


def _plan_of(route: dict[str, Any]) -> Plan:
    """What the rules say, as the plan that makes the same of Envoy."""
    (rule,) = route["spec"]["rules"]
    weights = {backend["name"]: backend["weight"] for backend in rule.get("backendRefs") or ()}
    if not weights or set(weights) == {nowhere_name(route["metadata"]["name"])}:
        return Plan()
    processes = {f"{RELEASE}-{process}": process for process in PRODUCTION_PROCESSES}
    annotations = route["metadata"]["annotations"]
    roles = {Slot.STABLE: "perch/stable", Slot.CANARY: "perch/canary"}
    slots = {
        slot: Deployment(_NOTHING, f"serving-{annotations[key]}", 0)
        for slot, key in roles.items()
        if annotations[key] != "none"
    }
    of_canary = sum(weight for name, weight in weights.items() if processes[name] == _process(slots, Slot.CANARY))
    mirror = any(known["type"] == "RequestMirror" for known in rule.get("filters") or ())
    return Plan(slots, Routing(round(100 * of_canary / sum(weights.values())), mirror), live=True)


def _without_marks(table: dict[str, Any]) -> dict[str, Any]:
    """Copies without the header that marks them: the Gateway API has no way to ask for it."""
    for host in table["resources"][0]["virtual_hosts"]:
        for route in host["routes"]:
            for policy in route.get("route", {}).get("request_mirror_policies", ()):
                del policy["request_headers_mutations"]
    return table


def _process(slots: dict[Slot, Deployment], slot: Slot) -> str:
    return slots[slot].process if slot in slots else ""


def _replace(file: Path, tree: Any) -> Path:
    draft = file.with_name(f".{file.name}")
    draft.write_text(json.dumps(tree))
    return draft.replace(file)
