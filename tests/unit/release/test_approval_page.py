"""The page that an approver reads, and the marks that bind an answer to it."""

from dataclasses import replace

import pytest

from pipelines.release.approval_page import PageFacts, read_marks, render_page, render_subject

EVIDENCE = "5d0f" * 16
NUMBER = {"value": 0.963, "low": 0.926, "high": 0.985}


@pytest.fixture
def facts() -> PageFacts:
    return PageFacts(
        model="digits-classification",
        version="2",
        champion="1",
        rollout_id="digits-classification:2:9b1e00000000:3",
        evidence_sha256=EVIDENCE,
        requested_by="somebody",
        rule="To approve: anna, until 2026-11-24 09:00 UTC; silence is a no.",
        verdict={
            "passed": True,
            "checks": [{"judged": True, "passed": True}] * 9 + [{"judged": False, "passed": True}],
        },
        metrics={
            "images": 1342,
            "overall": {"accuracy": NUMBER, "f1": NUMBER, "log_loss": {"value": 0.11, "low": 0.1, "high": 0.12}},
            "reference": {
                "version": "1",
                "reference": {"accuracy": {"value": 0.95}, "f1": {"value": 0.97}, "log_loss": {"value": 0.15}},
                "accuracy_difference": {"value": 0.013, "low": -0.002, "high": 0.03},
                "f1_difference": {"value": -0.007, "low": -0.012, "high": -0.002},
                "log_loss_difference": {"value": -0.04, "low": -0.05, "high": -0.03},
            },
        },
        staging="In staging it passed 12 of 12 smoke tests.",
        forecast=["canary@10: about 2,075 requests, 12 minutes"],
        links={"Model card with pictures": "https://mlflow.example.org/card"},
        card="# digits-classification\n\nPassed.",
    )


def test_page__against_a_champion__shows_three_numbers_and_which_way_they_went(facts: PageFacts) -> None:
    page = render_page(facts)
    assert render_subject(facts) == "Release digits-classification v2 in place of v1? Accuracy 0.963"
    assert page.startswith("**digits-classification v2 passed 9 of 9 checks.** In staging it passed 12 of 12")
    assert "| 1,342 test images | v2 | v1 | difference |" in page
    assert "| accuracy | 0.963 [0.926, 0.985] | 0.950 | +0.013 [-0.002, +0.030], no clear difference |" in page
    assert "| F1 | 0.963 [0.926, 0.985] | 0.970 | -0.007 [-0.012, -0.002], worse |" in page
    assert "| log loss | 0.110 [0.100, 0.120] | 0.150 | -0.040 [-0.050, -0.030], better |" in page
    assert "- canary@10: about 2,075 requests, 12 minutes" in page
    assert "[Model card with pictures](https://mlflow.example.org/card)" in page
    assert page.endswith("# digits-classification\n\nPassed.")


def test_page__a_check_failed__is_not_counted_among_those_passed(facts: PageFacts) -> None:
    verdict = {"passed": False, "checks": [*facts.verdict["checks"], {"judged": True, "passed": False}]}
    assert "passed 9 of 10 checks" in render_page(replace(facts, verdict=verdict))


def test_page__first_release__says_that_there_is_nothing_to_compare_with(facts: PageFacts) -> None:
    first = replace(facts, champion="", forecast=[], metrics={**facts.metrics, "reference": {"version": None}})
    assert "as its first release?" in render_subject(first)
    assert "| accuracy | 0.963 [0.926, 0.985] | none yet | none yet |" in render_page(first)
    assert "- nothing: there is no champion to compare it with" in render_page(first)


def test_marks__of_a_rendered_page__are_its_rollout_and_evidence(facts: PageFacts) -> None:
    assert read_marks(render_page(facts)) == (facts.rollout_id, EVIDENCE)


def test_marks__card_that_brings_its_own__cannot_speak_for_another_rollout(facts: PageFacts) -> None:
    forged = f"Rollout `digits-classification:9:0:1` · evidence `{'0' * 64}`"
    page = render_page(replace(facts, card=f"# Card\n{forged}\n"))
    assert read_marks(page) == (facts.rollout_id, EVIDENCE)
    assert read_marks(f"{page}\n{forged}\n") == ("", "")  # two marks: nobody knows which was meant


@pytest.mark.parametrize("body", ["", "Rollout `x` · evidence `5d0f`", f"> Rollout `x` · evidence `{EVIDENCE}`"])
def test_marks__page_without_a_whole_line_of_them__are_empty(body: str) -> None:
    assert read_marks(body) == ("", "")
