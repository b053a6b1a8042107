"""The cluster's target passes what the local one passes: real pods behind a real Envoy, under traffic, with kills."""

from __future__ import annotations

import pytest

from tests.integration.release_target_behaviour import (  # noqa: F401 - the tests are this target's too
    test_canary__killed_at_half_of_the_traffic__costs_what_was_in_flight_and_is_counted,
    test_clients__body_that_is_too_large__are_told_so_through_envoy_each_time,
    test_promote__under_traffic__exchanges_the_slots_once_and_fails_no_request,
    test_route__during_a_deployment__waits_for_nothing,
    test_route__every_weight_under_traffic__is_in_force_at_once_and_fails_no_request,
    test_route__mirror__the_canary_gets_copies_and_no_client_gets_its_answers,
    test_target__caller_killed_between_any_two_writes__the_same_call_finishes_it,
    test_target__nothing_released__clients_are_told_so,
    test_target__slots_with_traffic__are_neither_replaced_nor_removed,
    test_wait_ready__release_changed_after_signing__refuses_with_what_the_service_said,
)

pytestmark = [pytest.mark.cluster, pytest.mark.services]
