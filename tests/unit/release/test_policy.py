"""The promotion policy: each rule, who could, and properties that hold for any answers."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import Refusal
from pipelines.release import policy as policy_module
from pipelines.release.approvals import ApprovalRequest, Response, evidence_hash
from pipelines.release.policy import Decision, Freeze, ModelRule, PromotionPolicy, decide, load_policy, policy_schema

ASKED = datetime(2026, 11, 20, 9, 0, tzinfo=UTC)  # a Friday
EVIDENCE = "5d" * 32
REQUEST = ApprovalRequest("digits:2:abc:1", "digits", "2", EVIDENCE, "scheduler", ASKED)


def answer(
    who: str = "approver", hours: float = 1, *, approves: bool = True, evidence: str = EVIDENCE, comment: str = "fine"
) -> Response:
    return Response(who, ASKED + timedelta(hours=hours), approves, evidence, comment)


def weigh(*answers: Response, hours: float = 2, rule: ModelRule | None = None, **policy: object) -> Decision:
    whole = PromotionPolicy(models={"*": rule or ModelRule()}, **policy)  # type: ignore[arg-type]
    return decide(whole, REQUEST, answers, ASKED + timedelta(hours=hours))


def test_decide__no_answer__waits_and_says_for_whom_and_how_long() -> None:
    decision = weigh()
    assert decision.outcome == "waiting"
    assert decision.reason == "1 approval by anybody but scheduler, until 2026-11-23 09:00 UTC"


def test_decide__approved__carries_the_answer() -> None:
    assert weigh(answer()) == Decision("approved", (answer(),), (), "")


NAMED = ModelRule(approvers=("ann", "bob"))


@pytest.mark.parametrize(
    ("given_answer", "rule", "broken", "words"),
    [
        (answer("eve"), NAMED, "approvers", "eve: may not decide about digits; ann or bob may"),
        (answer("scheduler"), ModelRule(), "requester", "anybody but scheduler may"),
        (
            answer("ann", evidence="ab" * 32),
            NAMED,
            "evidence",
            "approved evidence abababababab, but it is 5d5d5d5d5d5d",
        ),
        (answer("ann", -1), NAMED, "time", "before anything was asked"),
        (answer("ann", 80), NAMED, "deadline", "answered 2026-11-23 17:00 UTC, after 2026-11-23 09:00 UTC"),
        (answer("ann", approves=False, comment=" "), NAMED, "comment", "rejected without a comment"),
        (answer("ann", comment=""), ModelRule(comment_to_approve=True), "comment", "approved without a comment"),
        (answer(""), ModelRule(), "responder", "names nobody"),
    ],
)
def test_decide__answer_that_breaks_a_rule__does_not_count_and_says_which(
    given_answer: Response, rule: ModelRule, broken: str, words: str
) -> None:
    decision = weigh(given_answer, rule=rule)
    assert decision.outcome == "waiting"
    assert [denial.rule for denial in decision.denials] == [broken]
    assert words in decision.denials[0].reason


def test_decide__two_people_are_asked__one_who_answers_twice_is_one() -> None:
    rule = ModelRule(approvers=("ann", "bob", "cid"), min_approvals=2)
    decision = weigh(answer("ann"), answer("ann", 1.5), rule=rule)
    assert (decision.outcome, len(decision.approvals)) == ("waiting", 1)
    assert decision.reason.startswith("1 approval by bob or cid")
    assert [denial.rule for denial in decision.denials] == ["once"]
    assert decision.denials[0].reason == "ann: has approved already, and counts once; bob or cid may"
    assert weigh(answer("ann"), answer("bob"), rule=rule).outcome == "approved"


def test_decide__rejected_by_one_of_those_who_may__is_rejected_whatever_others_say() -> None:
    decision = weigh(answer("ann"), answer("bob", approves=False, comment="worse on 8"), rule=NAMED, hours=3)
    assert (decision.outcome, decision.reason) == ("rejected", "rejected by bob: worse on 8")


def test_decide__rejected_by_somebody_else__goes_on_waiting() -> None:
    assert weigh(answer("eve", approves=False), rule=NAMED).outcome == "waiting"


@pytest.mark.parametrize(("hours", "outcome"), [(71.99, "approved"), (72, "rejected"), (72.01, "rejected")])
def test_decide__answer_races_the_deadline__counts_only_before_it(hours: float, outcome: str) -> None:
    assert weigh(answer(hours=hours), hours=100).outcome == outcome


FREEZE = Freeze(name="year end", begins=ASKED, ends=ASKED + timedelta(days=2))


def test_decide__approved_in_a_freeze__waits_for_its_end() -> None:
    decision = weigh(answer(), freezes=(FREEZE,))
    assert decision.outcome == "waiting"
    assert decision.reason == "approved, but the freeze 'year end' holds until 2026-11-22 09:00 UTC"
    assert weigh(answer(), freezes=(FREEZE,), hours=49).outcome == "approved"


@pytest.mark.parametrize(
    ("moment", "until"),
    [
        ("2026-11-20T14:59", None),
        ("2026-11-20T15:00", "2026-11-21T00:00"),
        ("2026-11-21T12:00", None),
    ],
)
def test_freeze__on_days_of_the_week__holds_from_its_time_to_midnight(moment: str, until: str | None) -> None:
    freeze = Freeze(name="Friday afternoon", days=("fri",), from_time="15:00")
    found = freeze.until(datetime.fromisoformat(moment).replace(tzinfo=UTC))
    assert found == (datetime.fromisoformat(until).replace(tzinfo=UTC) if until else None)


def test_freeze__other_model__does_not_hold() -> None:
    freeze = FREEZE.model_copy(update={"models": ("x-rays",)})
    assert weigh(answer(), freezes=(freeze,)).outcome == "approved"


# Properties

people = st.sampled_from(["ann", "bob", "cid", "eve", "scheduler", ""])
answers = st.lists(
    st.builds(
        answer,
        people,
        st.floats(-2, 100),
        approves=st.booleans(),
        evidence=st.sampled_from([EVIDENCE, "ab" * 32]),
        comment=st.sampled_from(["", "fine"]),
    ),
    max_size=8,
)
rules = st.builds(
    ModelRule,
    approvers=st.sampled_from([(), ("ann", "bob", "cid"), ("ann", "scheduler", "bob")]),
    min_approvals=st.integers(1, 3),
    requester_may_approve=st.booleans(),
    comment_to_approve=st.booleans(),
)


@given(answers, rules, st.floats(0, 120))
def test_decide__any_answers__approves_only_what_enough_people_who_may_have_said(
    given_answers: list[Response], rule: ModelRule, hours: float
) -> None:
    decision = weigh(*given_answers, rule=rule, hours=hours)
    if decision.outcome != "approved":
        return
    names = [entry.responder for entry in decision.approvals]
    assert len(set(names)) == len(names) >= rule.min_approvals
    assert all(entry.evidence_sha256 == EVIDENCE and entry.approves for entry in decision.approvals)
    assert all(ASKED <= entry.responded_at < ASKED + timedelta(hours=72) for entry in decision.approvals)
    assert not rule.approvers or set(names) <= set(rule.approvers)
    assert "" not in names
    assert rule.requester_may_approve or "scheduler" not in names


@given(answers, rules, st.randoms())
def test_decide__answers_in_another_order__change_nothing(
    given_answers: list[Response], rule: ModelRule, random: object
) -> None:
    shuffled = list(given_answers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert weigh(*shuffled, rule=rule).outcome == weigh(*given_answers, rule=rule).outcome


@given(answers, rules)
def test_decide__every_answer__is_counted_or_denied_with_a_reason(
    given_answers: list[Response], rule: ModelRule
) -> None:
    decision = weigh(*given_answers, rule=rule)
    assert all(denial.reason and denial.rule for denial in decision.denials)
    if decision.outcome == "waiting":
        counted = {entry.responder for entry in decision.approvals}
        denied = {denial.responder for denial in decision.denials}
        assert {entry.responder for entry in given_answers} == counted | denied


# The file


def test_load_policy__none__is_the_built_in_one() -> None:
    assert load_policy(None) == PromotionPolicy()


def test_load_policy__a_file__is_read(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(
        "models:\n  xray-classification:\n    approvers: [m.approver, s.second]\n    min_approvals: 2\n"
        "freezes:\n  - name: year end\n    begins: 2026-12-20T00:00:00Z\n    ends: 2027-01-02T00:00:00Z\n"
        "  - {name: Friday afternoon, days: [fri], from_time: '15:00'}\n"
    )
    policy = load_policy(file)
    assert policy.rule_for("xray-classification").min_approvals == 2
    assert policy.rule_for("digits") == ModelRule()
    assert "Friday afternoon" in policy.frozen("digits", datetime(2026, 11, 20, 16, tzinfo=UTC))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: {digits: {approver: [ann]}}", "models.digits.approver: Extra inputs"),
        ("models: {digits: {approvers: [ann], min_approvals: 2}}", "can never be reached by 1 approvers"),
        ("freezes: [{name: x}]", "needs either begins and ends, or days"),
        ("freezes: [{name: x, begins: 2026-12-20T00:00:00, ends: 2027-01-02T00:00:00}]", "timezone"),
        ("models: [", "is not YAML"),
        ("- 1", "the file:"),
    ],
)
def test_load_policy__a_mistake__is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    with pytest.raises(Refusal) as caught:
        load_policy(file)
    assert words in str(caught.value)


def test_policy_schema__its_file__is_what_the_code_says() -> None:
    file = Path(policy_module.__file__).with_name("policy.schema.json")
    assert json.loads(file.read_text()) == policy_schema()


def test_evidence_hash__any_part_changed__is_another() -> None:
    parts = {f"{name}_sha256": "0" * 64 for name in ("registration", "model_card", "verdict", "release", "plan")}
    hashes = {evidence_hash(**parts)} | {evidence_hash(**{**parts, name: "1" * 64}) for name in parts}
    assert len(hashes) == 6
