"""Airflow as a certain user: where it is, and with whose password."""

from __future__ import annotations

import json

from pipelines.errors import Refusal, TryLater
from pipelines.services.airflow_client import AirflowClient
from pipelines.services.secrets import passwords_file
from pipelines.services.stack import Stack
from pipelines.settings import Settings

_READER = "admin"  # of the log-ins that `perch up` makes


def find_airflow_uri(settings: Settings) -> str:
    """Airflow's address: that of the settings, else that of the services on this machine.

    Raises:
        TryLater: neither is known.
    """
    if settings.airflow_uri:
        return settings.airflow_uri
    try:
        return Stack(settings).ports().airflow_uri
    except FileNotFoundError:
        raise TryLater(
            "Airflow: nobody says where it is\n  what to do: `perch up`, or set PERCH_AIRFLOW_URI to its address"
        ) from None


def how_to_release(settings: Settings, version: str) -> str:
    """How a person has a version released: the DAG that asks the approvers, with its address where Airflow runs."""
    uri, stack = settings.airflow_uri, Stack(settings)
    if not uri and not stack.has_slots_alone and stack.status():
        uri = stack.ports().airflow_uri
    where = f" at {uri}/dags/model_release" if uri else ""
    start = "" if uri or settings.target != "local" else "`perch up`, then "
    form = f"with {version} in the form's field Version"
    return f"{start}in Airflow trigger the DAG model_release{where} {form}, then `perch approve {version}`"


def open_airflow(settings: Settings, user: str = "") -> AirflowClient:
    """A client for a user's calls.

    Args:
        settings: name the address, and a user with a password where it is not one of this machine.
        user: by default the one of the settings, else the administrator of this machine's Airflow.

    Raises:
        Refusal: the user's password is not known here.
        TryLater: Airflow's address is not known.
    """
    uri = find_airflow_uri(settings)  # first: where `perch up` was never called there are no passwords either
    user = user or settings.airflow_user or _READER
    if settings.airflow_password and user == settings.airflow_user:
        return AirflowClient(uri, user, settings.airflow_password)
    try:
        known = json.loads(passwords_file(settings).read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = {}
    if user not in known:
        raise Refusal(
            f"the Airflow user {user}",
            "has no password here",
            limit=f"one of {', '.join(sorted(known))}" if known else "",
            way_out="set PERCH_AIRFLOW_USER and PERCH_AIRFLOW_PASSWORD",
        )
    return AirflowClient(uri, user, known[user])
