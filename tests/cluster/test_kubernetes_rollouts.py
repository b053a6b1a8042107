"""Whole rollouts on the cluster: gates over Prometheus' numbers and predictions kept in S3, watchdog, a kill."""

from __future__ import annotations

import pytest

from tests.integration.test_rollout import (  # noqa: F401 - the tests are this target's too
    scene,
    test_rollout__canary_killed__loses_its_traffic_within_five_seconds,
    test_rollout__engine_gone_at_30_percent__the_watchdog_gives_the_traffic_back,
    test_rollout__good_release_under_traffic__is_promoted_then_taken_back_and_no_request_fails,
)

pytestmark = [pytest.mark.cluster, pytest.mark.services]
