from pipelines.predictions.release_events import describe_approvals, describe_steps

_AT = "2026-11-21T05:23:03+00:00"
_GATES = {"crashes": "promote: 0 processes ended unasked", "errors": "need more data: 3 requests"}


def test_describe_approvals__an_answer_from_airflow__says_who_and_why_without_the_run_it_came_from() -> None:
    approved = {
        "occurred_at": _AT,
        "event": "approved",
        "by": "approver",
        "comment": "looked at the model card",
        "requested_by": "admin",
        "evidence_sha256": "89bb8d1ada8550096650",
        "source": "airflow:model_release/asset_triggered/request_approval",
        "rollout": "digits-classification:2:904722027202:2",
    }
    assert describe_approvals([approved]) == [
        "approver 2026-11-21 05:23",
        "“looked at the model card”",
        "requested by admin",
        "evidence 89bb8d1ada85",
    ]


def test_describe_steps__each_kind_of_row__is_one_line_with_what_the_step_before_it_showed() -> None:
    shown = {"requests": 2032, "watched_s": 67.8, "gates": _GATES}
    steps = [
        {"event": "traffic", "step": "shadow", "after_step": "pending", "watched_s": 0.0},
        {"event": "traffic", "step": "canary@10", "after_step": "shadow", **shown},
        {"event": "promoted", "step": "promoted", "after_step": "canary@100", "probes": 900, **shown},
        {"event": "rolled_back", "from_step": "canary@10", "by": "watchdog", "reason": "slow", "traffic_moved_s": 0.2},
        {"event": "traffic", "step": "promoted", "skipped": ["shadow"], "reason": "the first release"},
    ]
    lines = describe_steps([{**step, "occurred_at": _AT} for step in steps])
    assert lines == [
        "shadow 2026-11-21 05:23",
        "10 % 2026-11-21 05:23: shadow 2,032 requests, 68 s, 1/2 gates",
        "promoted 2026-11-21 05:23: 100 % 2,032 requests (900 probes), 68 s, 1/2 gates",
        "rolled back from 10 % 2026-11-21 05:23 by watchdog, traffic moved in 0.2 s: slow",
        "no canary 2026-11-21 05:23: the first release",
    ]


def test_describe_steps__a_whole_rollout__leaves_each_line_in_80_columns() -> None:
    shown = {"requests": 99_999, "watched_s": 600.0, "gates": dict.fromkeys("abc", "promote: fine")}
    entry = {"event": "promoted", "step": "promoted", "after_step": "canary@100", "occurred_at": _AT, **shown}
    assert len(describe_steps([entry])[0]) <= 80 - 13
