"""Scales servers that hold no release to 0: a Deployment that names no `replicas` starts with a pod, and nothing in it.

Only the engine says how many pods a server has.  The chart must not name a number, which its next rollback would bring
back, so this is done here, once per revision of the chart, and only where there is no release.
"""

import http.client
import json
import os
import ssl
import sys
import time
from pathlib import Path

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TRIES = 20


def call(path, patch=None):
    """The answer of the Kubernetes API to a GET, or to a merge patch."""
    context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], int(os.environ["KUBERNETES_SERVICE_PORT"])
    connection = http.client.HTTPSConnection(host, port, timeout=10, context=context)
    headers = {
        "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
        "Content-Type": "application/merge-patch+json",
    }
    try:
        body = None if patch is None else json.dumps(patch)
        connection.request("GET" if patch is None else "PATCH", path, body, headers)
        answer = connection.getresponse()
        text = answer.read()
    except http.client.HTTPException as error:
        raise OSError(repr(error)) from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise OSError(f"{answer.status} {answer.reason}: {text[:500].decode(errors='replace')}")
    return json.loads(text)


def rest(namespace, name):
    """Set a Deployment to 0, unless it has a release; returns what was done."""
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{name}"
    found = call(path)
    annotations = found["spec"]["template"]["metadata"].get("annotations") or {}
    if annotations.get("perch/release-digest") or found["spec"]["replicas"] == 0:
        return f"{name}: left as it is"
    # With the version that was read: a release that comes in between is a conflict, and is looked at again.
    patch = {"metadata": {"resourceVersion": found["metadata"]["resourceVersion"]}, "spec": {"replicas": 0}}
    call(f"{path}?fieldManager=perch-engine", patch)
    return f"{name}: no release, 0 replicas"


def main(namespace, names):
    """Each of the Deployments, tried again where the API does not answer."""
    for name in names:
        for attempt in range(TRIES):
            try:
                print(rest(namespace, name), flush=True)
                break
            except (OSError, ValueError) as error:
                print(f"{name}: {error}", flush=True)
                time.sleep(min(2**attempt, 10) / 2)
        else:
            sys.exit(f"{name}: given up")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
