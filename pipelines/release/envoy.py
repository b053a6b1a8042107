"""Envoy's configuration as data: a bootstrap that never changes, and a route table that carries the whole plan.

The route table is Envoy's own format (RDS in a file).  The plan travels in it as metadata, which Envoy keeps and shows
unread: one rename changes slots and routes together, and Envoy itself can be asked what is in force.
https://www.envoyproxy.io/docs/envoy/latest/api-v3/config/route/v3/route_components.proto
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.core.image_limits import DEFAULT_MAX_BODY_BYTES
from pipelines.core.request_origins import SHADOW_HEADER
from pipelines.release.local_layout import HOST, LocalLayout, LocalPorts
from pipelines.release.local_plan import PRODUCTION_PROCESSES, Plan
from pipelines.release.targets import Slot

ROUTES = "clients"  # the route table's name
_PLAN = "perch"
_TYPE = "type.googleapis.com/envoy."
_PROBLEM_JSON = "application/problem+json"

# The service gives a request 10 s to arrive and 10 s to be answered: Envoy's are longer, so that the service's own
# words reach the client.
_ANSWER_LIMIT_S = 30
_IDLE_CLIENT_S = 60
_HEADERS_LIMIT_S = 15
# Below the 5 s after which uvicorn closes an idle connection: a request must not meet the closing.
_IDLE_UPSTREAM_S = 3
# A body up to this many bytes can be sent again, and copied to the canary: every image, not every batch.
_BUFFERED_BYTES = DEFAULT_MAX_BODY_BYTES


def bootstrap(layout: LocalLayout, ports: LocalPorts) -> dict[str, Any]:
    """What Envoy is started with: one listener, a cluster per service, routes from a watched file."""
    return {
        "node": {"id": "perch", "cluster": "perch"},
        "admin": {"address": _address(ports.admin)},
        "static_resources": {
            "listeners": [_listener(layout, ports)],
            "clusters": [
                *(_cluster(process, ports.slots[process].api) for process in PRODUCTION_PROCESSES),
                *(_cluster_with_fallback(process) for process in PRODUCTION_PROCESSES),
            ],
        },
    }


def route_table(plan: Plan, version: int) -> dict[str, Any]:
    """The content of the routes' file.

    Args:
        plan: to put in force.
        version: higher than the last, so that Envoy can say which one it has.
    """
    host = {
        "name": "all",
        "domains": ["*"],
        "routes": [_route(plan) if plan.live else _nothing_released()],
        # A client must not pass its requests off as copies.
        "request_headers_to_remove": [SHADOW_HEADER],
        "metadata": {"filter_metadata": {_PLAN: plan.as_json()}},
    }
    resource = {"@type": f"{_TYPE}config.route.v3.RouteConfiguration", "name": ROUTES, "virtual_hosts": [host]}
    return {"version_info": str(version), "resources": [resource]}


def read_route_table(table: Mapping[str, Any]) -> tuple[Plan, int]:
    """Plan and version of a route table."""
    (resource,) = table["resources"]
    return _plan_of(resource), int(table["version_info"])


def read_config_dump(dump: Mapping[str, Any]) -> tuple[Plan, int] | None:
    """Plan and version that Envoy has in force, from `/config_dump?resource=dynamic_route_configs`; None before any."""
    for entry in dump.get("configs", []):
        if entry.get("route_config", {}).get("name") == ROUTES and "version_info" in entry:
            return _plan_of(entry["route_config"]), int(entry["version_info"])
    return None


def read_healthy_clusters(clusters: Mapping[str, Any]) -> frozenset[str]:
    """Names of clusters with a host that passes its health checks, from `/clusters?format=json`."""
    return frozenset(
        status["name"]
        for status in clusters.get("cluster_statuses", [])
        if any(
            host.get("health_status", {}).get("eds_health_status") == "HEALTHY"
            and not host["health_status"].get("failed_active_health_check", False)
            for host in status.get("host_statuses", [])
        )
    )


def _plan_of(route_configuration: Mapping[str, Any]) -> Plan:
    (host,) = route_configuration["virtual_hosts"]
    return Plan.from_json(host["metadata"]["filter_metadata"][_PLAN])


def _route(plan: Plan) -> dict[str, Any]:
    percent = plan.routing.canary_percent
    weights = {}
    if percent < 100:
        weights[plan.slots[Slot.STABLE].process] = 100 - percent
    if percent:
        canary = plan.slots[Slot.CANARY].process
        # A canary that is gone costs no request: stable answers.  Never the other way round.
        weights[_with_fallback(canary) if Slot.STABLE in plan.slots else canary] = percent
    action: dict[str, Any] = {
        "weighted_clusters": {"clusters": [{"name": name, "weight": weight} for name, weight in weights.items()]},
        "timeout": f"{_ANSWER_LIMIT_S}s",
        "retry_policy": {
            # Only what no service can have begun to answer: an image that ends one service must not be sent to others.
            "retry_on": "connect-failure,refused-stream,reset-before-request",
            "num_retries": 5,
            "retry_back_off": {"base_interval": "0.05s", "max_interval": "1s"},
            "retry_priority": {
                "name": "envoy.retry_priorities.previous_priorities",
                "typed_config": {
                    "@type": f"{_TYPE}extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
                    "update_frequency": 1,
                },
            },
        },
    }
    if plan.routing.mirror:
        action["request_mirror_policies"] = [
            {
                "cluster": plan.slots[Slot.CANARY].process,
                # Envoy also appends `-shadow` to their host.
                "request_headers_mutations": [
                    {
                        "append": {
                            "header": {"key": SHADOW_HEADER, "value": "1"},
                            "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                        }
                    }
                ],
            }
        ]
    return {"match": {"prefix": "/"}, "route": action, "request_body_buffer_limit": _BUFFERED_BYTES}


def _nothing_released() -> dict[str, Any]:
    return {
        "match": {"prefix": "/"},
        "direct_response": {
            "status": 503,
            "body": {"inline_string": "no model has been released"},
        },
        "response_headers_to_add": [_header("retry-after", "60")],
    }


def _problem(slug: str, title: str, detail: str, status: object = "%RESPONSE_CODE%") -> dict[str, Any]:
    """RFC 9457, as the service answers; the service's own types, where there is one."""
    return {
        "type": f"urn:perch:{slug}",
        "title": title,
        "status": status,
        "detail": detail,
        "request_id": "%REQ(X-REQUEST-ID)%",
    }


def _header(key: str, value: str) -> dict[str, Any]:
    return {"header": {"key": key, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}


def _address(port: int, host: str = HOST) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(layout: LocalLayout, ports: LocalPorts) -> dict[str, Any]:
    manager = {
        "@type": f"{_TYPE}extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "clients",
        "rds": {
            "route_config_name": ROUTES,
            "config_source": {
                "resource_api_version": "V3",
                "path_config_source": {
                    "path": str(layout.routes_file),
                    "watched_directory": {"path": str(layout.routes_folder)},
                },
            },
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {
                    "@type": f"{_TYPE}extensions.filters.http.router.v3.Router",
                    "suppress_envoy_headers": True,
                },
            }
        ],
        "use_remote_address": True,
        "server_header_transformation": "PASS_THROUGH",
        # A request and its copy carry one id, the client's where it sent one: kept predictions are joined by it.
        "preserve_external_request_id": True,
        "request_id_extension": {
            "typed_config": {
                "@type": f"{_TYPE}extensions.request_id.uuid.v3.UuidRequestIdConfig",
                "pack_trace_reason": False,
            }
        },
        "request_headers_timeout": f"{_HEADERS_LIMIT_S}s",
        "stream_idle_timeout": f"{_IDLE_CLIENT_S}s",
        "common_http_protocol_options": {"idle_timeout": f"{_IDLE_CLIENT_S}s"},
        "local_reply_config": _local_replies(),
    }
    return {
        "name": "clients",
        "address": _address(ports.clients, ports.clients_host),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _local_replies() -> dict[str, Any]:
    """What Envoy answers itself is a problem too, as what the service answers."""

    def when(code: int, slug: str, title: str, status: int) -> dict[str, Any]:
        return {
            "filter": {
                "status_code_filter": {
                    "comparison": {"op": "EQ", "value": {"default_value": code, "runtime_key": f"perch.reply.{code}"}}
                }
            },
            "status_code": status,
            "headers_to_add": [_header("x-request-id", "%REQ(X-REQUEST-ID)%")],
            "body_format_override": {
                "json_format": _problem(slug, title, "%LOCAL_REPLY_BODY%", status),
                "content_type": _PROBLEM_JSON,
            },
        }

    return {
        "mappers": [
            when(400, "bad-request", "The request cannot be understood", 400),
            when(408, "request-timeout", "The request did not arrive in time", 408),
            when(503, "not-ready", "The service is starting or stopping", 503),
            when(504, "out-of-time", "The answer was not ready in time", 503),
        ],
        "body_format": {
            "json_format": _problem("bad-request", "The request cannot be understood", "%LOCAL_REPLY_BODY%"),
            "content_type": _PROBLEM_JSON,
        },
    }


def _with_fallback(process: str) -> str:
    return f"{process}-else-stable"


def _cluster(process: str, port: int) -> dict[str, Any]:
    # Envoy's own bounds (1,024 connections, 3 retries) would refuse before the service does.
    bounds = {"max_connections": 8192, "max_pending_requests": 8192, "max_requests": 8192, "max_retries": 1024}
    return {
        "name": process,
        "type": "STATIC",
        "connect_timeout": "2s",
        "load_assignment": {
            "cluster_name": process,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}}]}],
        },
        "circuit_breakers": {"thresholds": [bounds]},
        "health_checks": [
            {
                "timeout": "5s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_interval": "0.25s",
                "unhealthy_edge_interval": "0.25s",
                "healthy_threshold": 1,
                "unhealthy_threshold": 2,
                "http_health_check": {"path": "/readyz", "host": "envoy"},
            }
        ],
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http_protocol_options": {}},
                "common_http_protocol_options": {"idle_timeout": f"{_IDLE_UPSTREAM_S}s"},
            }
        },
    }


def _cluster_with_fallback(process: str) -> dict[str, Any]:
    other = next(name for name in PRODUCTION_PROCESSES if name != process)
    return {
        "name": _with_fallback(process),
        "connect_timeout": "2s",
        "lb_policy": "CLUSTER_PROVIDED",
        "cluster_type": {
            "name": "envoy.clusters.aggregate",
            "typed_config": {
                "@type": f"{_TYPE}extensions.clusters.aggregate.v3.ClusterConfig",
                "clusters": [process, other],
            },
        },
    }
