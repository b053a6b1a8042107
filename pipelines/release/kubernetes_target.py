"""The release target of a cluster: Deployments that the chart has laid out, traffic divided by an HTTPRoute.

The HTTPRoute is the one record of slots and traffic (`kubernetes_route`), written by server-side apply with the version
that it replaces: of two engines at once one is told to look again.  Every change is: write the route, bring the
Deployments in line with it.  A caller killed anywhere leaves the old record or the new one, and the same call again
finishes the work.  Dividing traffic needs the API server and the gateway alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.errors import Refusal, TryLater
from pipelines.release import kubernetes_pods as pods_of
from pipelines.release.http_exchange import exchange
from pipelines.release.kubernetes_api import CORE, DEPLOYMENTS, ROUTES, ClusterApi, Conflict
from pipelines.release.kubernetes_route import (
    RouteRecord,
    effective,
    find_edits,
    is_taken,
    object_name,
    read_record,
    route_document,
    route_name,
    unresolved,
)
from pipelines.release.local_plan import PROCESSES, PRODUCTION_PROCESSES, Deployment, Plan
from pipelines.release.prometheus_counters import (
    ask_prometheus,
    count_worker_crashes,
    counters_query,
    oldest_sample,
    read_answer,
)
from pipelines.release.targets import ReleaseRef, Routing, Slot, SlotCounters, TargetState
from pipelines.settings import Settings

REPLICAS = "perch/replicas"
_RELEASE = {"url": "address", "digest": "digest", "model": "model", "version": "version"}
_VERSION_HEADER = "x-model-version"
_TRIES = 12  # of a write that others come before
_IN_FORCE_LIMIT_S = 15.0
_ROUTABLE_LIMIT_S = 10.0
_END_LIMIT_S = 30.0
_ASK_LIMIT_S = 3.0
_MAX_AGE_S = 30.0  # of numbers; what promotes must be younger still
_LOG_LINES = 15


class KubernetesTarget:
    """A `ReleaseTarget` on the cluster and in the namespace that the settings name.

    Args:
        settings: with `kubernetes_release`, `kubernetes_namespace` and `prometheus_url`.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._release = settings.kubernetes_release
        self._connected: ClusterApi | None = None

    # ReleaseTarget

    def state(self) -> TargetState:
        """What the route says, edits by others included, and which services take requests."""
        record, _ = self._read()
        plan, pods = record.plan, self._pods()
        return TargetState(
            slots={slot: deployment.release for slot, deployment in plan.slots.items()},
            ready=frozenset(
                slot
                for slot, deployment in plan.slots.items()
                if pods_of.takes_requests(pods_of.current(pods, deployment.process), deployment.release.digest)
            ),
            routing=plan.routing,
        )

    def deploy(self, slot: Slot, release: ReleaseRef) -> None:
        """Put a release into a slot; its pods verify it before they unpack or load anything of it."""

        def change(plan: Plan) -> Plan:
            there = plan.slots.get(slot)
            # How many workers a service has, the chart says.
            return plan if there and there.release == release else plan.deployed(slot, release, 0)

        self._change(change, owners=self._owners())
        self._align()

    def wait_ready(self, slot: Slot, timeout_s: float) -> None:
        """Wait until all the slot's pods take requests and its Service answers with the release."""
        deadline = time.monotonic() + timeout_s
        while True:
            deployment = self._deployment(slot)
            pods = pods_of.current(self._pods(), deployment.process)
            own = pods_of.with_release(pods, deployment.release.digest)
            wanted = int(self._object(deployment.process)["spec"].get("replicas", 1))
            is_whole = len(own) >= wanted > 0 and all(pods_of.ready_since(pod) is not None for pod in own)
            if is_whole and pods_of.takes_requests(pods, deployment.release.digest) and self._answers(deployment):
                return
            if ended := pods_of.find_ended(own):
                log = self._api.read_log(
                    ended.pod, ended.container, previous=ended.is_running_again, lines=_LOG_LINES
                ).rstrip()
                raise Refusal(
                    f"the service in the slot {slot}",
                    f"ended while starting: {ended.reason}; the last lines of its log:\n{log}",
                    way_out=f"mend that; `kubectl logs {ended.pod} --container {ended.container}` has all of it",
                )
            if time.monotonic() > deadline:
                name = object_name(self._release, deployment.process)
                why = "its Service does not answer from here" if is_whole else pods_of.explain_waiting(own)
                raise TryLater(
                    f"the service in the slot {slot}: not ready after {timeout_s:g} s\n{why}\n"
                    f"  what to do: `kubectl describe deployment {name}`"
                )
            time.sleep(0.25)

    def route(self, routing: Routing) -> None:
        """Divide traffic; only a slot without traffic must show that it is ready."""
        self._put_in_force(lambda plan: plan.routed(routing))

    def promote(self) -> None:
        """Exchange the roles of canary and stable by one write; the pods do not notice."""
        self._put_in_force(lambda plan: plan.promoted())

    def observe(self, slot: Slot) -> SlotCounters | None:
        """What Prometheus has of the slot's pods, and crashes by their status; None where that is nothing or old."""
        if not self._settings.prometheus_url:
            return None
        try:
            record, _ = self._read()
            deployment = record.plan.slots.get(slot)
            if deployment is None:
                return None
            digest, now = deployment.release.digest, time.time()
            started_at = record.deployed_at.get(deployment.process, now)
            name = object_name(self._release, deployment.process)
            query = counters_query(self._api.namespace, name, digest, age_s=now - started_at)
            pods = pods_of.with_release(pods_of.current(self._pods(), deployment.process), digest)
            known = read_answer(ask_prometheus(self._settings.prometheus_url, query, _ASK_LIMIT_S))
        except (TryLater, OSError, ValueError):
            return None
        ready = {pod["metadata"]["name"]: since for pod in pods if (since := pods_of.ready_since(pod)) is not None}
        taken_at = oldest_sample(known, ready, now=time.time(), max_age_s=_MAX_AGE_S) if known else None
        if known is None or taken_at is None:
            return None
        counts = known.counts
        return SlotCounters(
            taken_at=taken_at,
            started_at=started_at,
            requests=counts.requests,
            errors=counts.errors,
            crashes=pods_of.count_crashes(pods) + count_worker_crashes(known, pods_of.count_workers(pods)),
            latency_buckets=counts.latency_buckets,
            labels=counts.labels,
            client_errors=counts.client_errors,
            probes=counts.probes,
        )

    def remove(self, slot: Slot) -> None:
        """End what is in a slot; its pods finish what they are answering."""
        self._change(lambda plan: plan.removed(slot) if slot in plan.slots else plan)
        self._align()
        self._wait_for_end()

    def client_url(self) -> str:
        """`PERCH_CLIENTS_URL`, else the route's first host name.

        Raises:
            Refusal: there is neither.
        """
        if self._settings.clients_url:
            return self._settings.clients_url.rstrip("/")
        hosts = self._live().get("spec", {}).get("hostnames") or ()
        if not hosts:
            raise Refusal("PERCH_CLIENTS_URL", "is not set, and the route has no host name", way_out="set it")
        return f"https://{hosts[0]}"

    def slot_url(self, slot: Slot) -> str:
        """The address of a slot's Service, which holds inside the cluster.

        Raises:
            Refusal: nothing is in the slot.
        """
        return self._service_url(self._deployment(slot).process)

    def pod_uids(self, slot: Slot) -> frozenset[str]:
        """The pods that are in a slot with its release and have not been told to end.

        Raises:
            Refusal: nothing is in the slot.
            TryLater: the API server does not answer.
        """
        deployment = self._deployment(slot)
        pods = pods_of.current(self._pods(), deployment.process)
        own = pods_of.with_release(pods, deployment.release.digest)
        return frozenset(pod["metadata"]["uid"] for pod in own)

    # The record.

    @property
    def _api(self) -> ClusterApi:
        if self._connected is None:
            self._connected = ClusterApi(self._settings.kubernetes_namespace)
        return self._connected

    def _live(self) -> dict[str, Any]:
        return self._api.get(ROUTES, "httproutes", route_name(self._release))

    def _read(self) -> tuple[RouteRecord, dict[str, Any]]:
        """The record with the division of traffic that the route really makes, and the route."""
        live = self._live()
        return effective(self._release, read_record(live), live), live

    def _deployment(self, slot: Slot) -> Deployment:
        deployment = self._read()[0].plan.slots.get(slot)
        if deployment is None:
            raise Refusal(f"the slot {slot}", "holds no release", way_out="deploy one")
        return deployment

    def _change(
        self,
        change: Callable[[Plan], Plan],
        *,
        check: Callable[[Plan, Plan], None] | None = None,
        owners: Sequence[dict[str, Any]] | None = None,
    ) -> int:
        """Write the route, unless it says the same already; what others have edited in it is put right.

        Args:
            change: of the plan.
            check: whether that is allowed, by the plan before and after.
            owners: of the route; by default they stay, for moving traffic must not need the Deployments.

        Returns:
            The generation that a gateway has to take.
        """
        for _ in range(_TRIES):
            record, live = self._read()
            changed = record.changed_to(change(record.plan), time.time())
            if check is not None:
                check(record.plan, changed.plan)
            keep = live["metadata"].get("ownerReferences") or ()
            document = route_document(self._release, changed, live, keep if owners is None else owners)
            if not find_edits(document, live):
                return int(live["metadata"].get("generation", 0))
            try:
                return int(self._api.apply(ROUTES, "httproutes", document)["metadata"].get("generation", 0))
            except Conflict:
                time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 - so that two do not meet again
        raise TryLater("the HTTPRoute is written by somebody else all the time\n  what to do: try again")

    def _owners(self) -> list[dict[str, Any]]:
        """The route goes away with the servers that it leads to, once both are gone."""
        owners = [self._object(process) for process in PRODUCTION_PROCESSES]
        kind = {"apiVersion": "apps/v1", "kind": "Deployment"}
        return [{**kind, **{key: known["metadata"][key] for key in ("name", "uid")}} for known in owners]

    def _put_in_force(self, change: Callable[[Plan], Plan]) -> None:
        generation = self._change(change, check=self._require_routable)
        deadline = time.monotonic() + _IN_FORCE_LIMIT_S
        while not is_taken(live := self._live(), generation):
            if time.monotonic() > deadline:
                why = unresolved(live, generation)
                raise TryLater(
                    f"no gateway takes the HTTPRoute {route_name(self._release)}{why and f': {why}'}\n"
                    "  what to do: `kubectl describe httproute` says what gateways make of it; it is written, "
                    "and comes into force when they come back"
                )
            time.sleep(0.05)

    def _require_routable(self, before: Plan, plan: Plan) -> None:
        """Refuse to send traffic where none was and no service is ready."""
        for slot, deployment in plan.slots.items():
            had = next((old for old, known in before.slots.items() if known.process == deployment.process), slot)
            if not plan.has_traffic(slot) or before.has_traffic(had):
                continue
            pods = pods_of.current(self._pods(), deployment.process)
            if not pods_of.takes_requests(pods, deployment.release.digest):
                raise Refusal(
                    f"the slot {slot}",
                    "is not ready",
                    limit="a service that takes requests",
                    way_out=f"`kubectl describe deployment {object_name(self._release, deployment.process)}`",
                )
            deadline = time.monotonic() + _ROUTABLE_LIMIT_S
            while not self._answers(deployment):
                if time.monotonic() > deadline:
                    raise TryLater(f"the Service of the slot {slot} does not answer from here\n  what to do: try again")
                time.sleep(0.1)

    # Servers.

    def _align(self) -> None:
        """Bring the Deployments in line with the record.

        A Deployment is read before the record is, and written only as it was read: of two callers the one with the
        older record fails, and looks again.
        """
        for process in PROCESSES:
            for _ in range(_TRIES):
                live = self._object(process)
                wanted = {known.process: known.release for known in self._read()[0].plan.slots.values()}.get(process)
                document = _deployment_document(live, wanted)
                if document is None:
                    break
                try:
                    self._api.apply(DEPLOYMENTS, "deployments", document)
                    break
                except Conflict:
                    time.sleep(random.uniform(0.01, 0.1))  # noqa: S311
            else:
                raise TryLater(f"the Deployment of {process} changes all the time\n  what to do: try again")

    def _wait_for_end(self) -> None:
        """Until every pod that is not wanted has been told to end: a deployment right after must not find it again."""
        deadline = time.monotonic() + _END_LIMIT_S
        while True:
            wanted = {known.process for known in self._read()[0].plan.slots.values()}
            pods = self._pods()
            if not any(pods_of.current(pods, process) for process in PROCESSES if process not in wanted):
                return
            if time.monotonic() > deadline:
                raise TryLater("pods do not end\n  what to do: `kubectl get pods`; try again")
            time.sleep(0.1)

    def _object(self, process: str) -> dict[str, Any]:
        return self._api.get(DEPLOYMENTS, "deployments", object_name(self._release, process))

    def _pods(self) -> list[dict[str, Any]]:
        return self._api.list_pods(f"app.kubernetes.io/instance={self._release},app.kubernetes.io/component=serving")

    def _service_url(self, process: str) -> str:
        return service_url(self._api.get(CORE, "services", object_name(self._release, process)))

    def _answers(self, deployment: Deployment) -> bool:
        """Whether the Service leads to a pod that takes requests and serves the release."""
        try:
            answer = exchange(f"{self._service_url(deployment.process)}/readyz", _ASK_LIMIT_S)
        except OSError:
            return False
        return answer.headers.get(_VERSION_HEADER) == deployment.release.version


def service_url(service: Mapping[str, Any]) -> str:
    """The address of a Service's port for requests, which holds inside the cluster.

    Raises:
        TryLater: it has none any more.
    """
    spec = service["spec"]
    port = next((known["port"] for known in spec.get("ports") or () if known.get("name") == "http"), None)
    if port is None:
        name = service["metadata"]["name"]
        raise TryLater(f"the Service {name} has no port named http\n  what to do: `helm upgrade` puts it back")
    address = spec["clusterIP"]
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _deployment_document(live: Mapping[str, Any], release: ReleaseRef | None) -> dict[str, Any] | None:
    """What a Deployment has to say for a release, or for none; None where it says so already."""
    metadata, spec = live["metadata"], live["spec"]
    annotations = spec["template"]["metadata"].get("annotations") or {}
    found = {key: value for key, value in annotations.items() if key.startswith("perch/release-")}
    wanted = {f"perch/release-{key}": getattr(release, name) for key, name in _RELEASE.items()} if release else {}
    replicas = 0
    if release:
        first = int((metadata.get("annotations") or {}).get(REPLICAS, "1"))
        # How many a running one has, the autoscaler says.
        replicas = int(spec.get("replicas", 1)) if found == wanted and spec.get("replicas", 1) else first
    if found == wanted and spec.get("replicas", 1) == replicas:
        return None
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "resourceVersion": metadata["resourceVersion"],
        },
        "spec": {"replicas": replicas, "template": {"metadata": {"annotations": wanted}}},
    }
