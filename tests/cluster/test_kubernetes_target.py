"""The cluster's target passes what the local one passes: real pods behind a real Envoy, under traffic, with kills."""

from __future__ import annotations

import pytest

from tests.integration.release_target_behaviour import *  # noqa: F403 - each of its tests

pytestmark = [pytest.mark.cluster, pytest.mark.services]
