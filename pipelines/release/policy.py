"""Who may approve which model, how many it takes, and when nothing is released: the promotion policy, a YAML file.

Without a file the built-in policy holds: one approval, by anybody but the person who asked for the release.  The
functions here are pure; where answers come from is the business of `approvals`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.core.moments import format_minute
from pipelines.errors import Refusal
from pipelines.release.approvals import ApprovalRequest, Response

EVERY_MODEL = "*"
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]


def _parse_time(value: str) -> str:
    time.fromisoformat(value)  # raises ValueError, which pydantic words
    return value


TimeOfDay = Annotated[str, AfterValidator(_parse_time)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRule(_Part):
    """Who decides about a model."""

    approvers: tuple[str, ...] = Field(
        (), description="Names that may approve; empty takes everybody whom Airflow lets answer."
    )
    min_approvals: int = Field(1, ge=1, le=10, description="Different people who must approve.")
    requester_may_approve: bool = Field(
        False, description="Whether the person who asked for the release counts among them."
    )
    deadline_h: float = Field(72, gt=0, le=24 * 90, description="Hours after which the answer is no.")
    comment_to_approve: bool = Field(False, description="Whether an approval needs a comment, as a rejection does.")

    @model_validator(mode="after")
    def _enough_approvers(self) -> ModelRule:
        if self.approvers and len(set(self.approvers)) < self.min_approvals:
            raise ValueError(
                f"min_approvals {self.min_approvals} can never be reached by {len(set(self.approvers))} approvers"
            )
        return self


class Freeze(_Part):
    """A time in which no traffic moves towards a new release; rollbacks always may."""

    name: str = Field(min_length=1, description="Why, for whoever is held up.")
    models: tuple[str, ...] = Field((EVERY_MODEL,), description="Models it holds for; `*` is every one.")
    begins: AwareDatetime | None = Field(None, description="First moment, with its zone.")
    ends: AwareDatetime | None = Field(None, description="First moment after it, with its zone.")
    days: tuple[Day, ...] = Field((), description="Instead of begins and ends: days of each week, UTC.")
    from_time: TimeOfDay = Field("00:00", description="On these days from this time on, UTC.")

    @model_validator(mode="after")
    def _one_kind(self) -> Freeze:
        dated = self.begins is not None and self.ends is not None
        if dated == bool(self.days):
            raise ValueError("needs either begins and ends, or days")
        if self.begins is not None and self.ends is not None and self.ends <= self.begins:
            raise ValueError("ends must lie after begins")
        return self

    def until(self, now: datetime) -> datetime | None:
        """When it ends, where it holds now; None where it does not."""
        if self.begins is not None and self.ends is not None:
            return self.ends if self.begins <= now < self.ends else None
        here = now.astimezone(UTC)
        if _DAYS[here.weekday()] not in self.days or here.time() < time.fromisoformat(self.from_time):
            return None
        end = here.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
        while _DAYS[end.weekday()] in self.days and time.fromisoformat(self.from_time) == time():
            end += timedelta(days=1)
            if end - here > timedelta(days=7):
                break  # every day of the week: it never ends
        return end


class PromotionPolicy(_Part):
    """The whole policy."""

    models: dict[str, ModelRule] = Field(
        default_factory=dict, description="Model to its rule; `*` holds where a model has none of its own."
    )
    freezes: tuple[Freeze, ...] = Field((), description="Times in which nothing is released.")

    def rule_for(self, model: str) -> ModelRule:
        """The rule of a model."""
        return self.models.get(model) or self.models.get(EVERY_MODEL) or ModelRule()

    def frozen(self, model: str, now: datetime) -> str:
        """Which freeze holds for a model now, as a sentence; empty where none does."""
        for freeze in self.freezes:
            until = freeze.until(now)
            if until is not None and {model, EVERY_MODEL} & set(freeze.models):
                return f"the freeze {freeze.name!r} holds until {format_minute(until)}"
        return ""


@dataclass(frozen=True)
class Denial:
    """An answer that does not count.

    Attributes:
        responder: who gave it.
        rule: that it breaks, e.g. `approvers`.
        reason: as a sentence, with who could.
    """

    responder: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """What the answers so far amount to.

    Attributes:
        outcome: approved, rejected, or waiting.
        approvals: the answers that count, one per person, first answer first.
        denials: those that do not, each with the rule; a second approval by the same person is one of them.
        reason: of a rejection, or what is waited for.
    """

    outcome: Literal["approved", "rejected", "waiting"]
    approvals: tuple[Response, ...]
    denials: tuple[Denial, ...]
    reason: str


def decide(policy: PromotionPolicy, request: ApprovalRequest, responses: Sequence[Response], now: datetime) -> Decision:
    """Weigh the recorded answers to a request.

    A rejection by anybody who might have approved ends it.  Silence never approves: at the deadline the answer is no,
    unless the approvals that were given before it suffice.

    Args:
        policy: who may.
        request: what was asked, of whom the answer counts, and the hash of what they were shown.
        responses: all recorded answers, in any order.
        now: the present.
    """
    rule = policy.rule_for(request.model)
    deadline = request.requested_at + timedelta(hours=rule.deadline_h)
    approvals: dict[str, Response] = {}
    denials = []
    for response in sorted(responses, key=lambda entry: (entry.responded_at, entry.responder)):
        denial = _deny(rule, request, response, deadline)
        if denial is not None:
            denials.append(denial)
        elif not response.approves:
            return Decision(
                "rejected",
                (),
                tuple(denials),
                f"rejected by {response.responder}: {response.comment}",
            )
        elif response.responder in approvals:
            denials.append(_deny_again(rule, request, response, approvals.values()))
        else:
            approvals[response.responder] = response
    given = tuple(approvals.values())
    if len(given) >= rule.min_approvals:
        if frozen := policy.frozen(request.model, now):
            return Decision("waiting", given, tuple(denials), f"approved, but {frozen}")
        return Decision("approved", given, tuple(denials), "")
    if now >= deadline:
        return Decision("rejected", given, tuple(denials), f"nobody approved by {format_minute(deadline)}")
    missing = rule.min_approvals - len(given)
    people = "1 approval" if missing == 1 else f"{missing} approvals by different people"
    return Decision(
        "waiting",
        given,
        tuple(denials),
        f"{people} by {_who_could(rule, request, given)}, until {format_minute(deadline)}",
    )


def load_policy(path: Path | None) -> PromotionPolicy:
    """Read a policy file; None is the built-in policy.

    Raises:
        Refusal: the file is missing, is not YAML, or does not fit the schema.
    """
    if path is None:
        return PromotionPolicy()
    thing = f"the promotion policy {path}"
    way_out = "mend it; `pipelines/release/policy.schema.json` says what it may hold"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(thing, error.strerror, way_out="PERCH_PROMOTION_POLICY names it") from error
    except yaml.YAMLError as error:
        raise Refusal(thing, f"is not YAML: {error}", way_out=way_out) from None
    try:
        return PromotionPolicy.model_validate(tree if tree is not None else {})
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in detail['loc']) or 'the file'}: "
            f"{detail['msg'].removeprefix('Value error, ')}"
            for detail in error.errors(include_url=False)
        ]
        raise Refusal(thing, "\n  " + "\n  ".join(lines), way_out=way_out) from None


def policy_schema() -> dict[str, Any]:
    """The JSON Schema of a policy file, for editors; `policy.schema.json` holds it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **PromotionPolicy.model_json_schema()}


def _deny(rule: ModelRule, request: ApprovalRequest, response: Response, deadline: datetime) -> Denial | None:
    """Why an answer does not count; None where it does."""

    def denial(name: str, reason: str) -> Denial:
        return Denial(response.responder, name, f"{response.responder}: {reason}")

    could = _who_could(rule, request, ())
    if not response.responder:
        return denial("responder", "the answer names nobody; it must be given in Airflow, or by `perch approve`")
    if rule.approvers and response.responder not in rule.approvers:
        return denial("approvers", f"may not decide about {request.model}; {could} may")
    if response.responded_at < request.requested_at:
        return denial(
            "time", f"answered {format_minute(response.responded_at)}, before anything was asked; answer again"
        )
    if response.responded_at >= deadline:
        return denial(
            "deadline",
            f"answered {format_minute(response.responded_at)}, after {format_minute(deadline)}; release anew",
        )
    if not response.approves:
        # A rejection counts whatever was shown, and whoever asked: it only keeps things as they are.
        return None if response.comment.strip() else denial("comment", "rejected without a comment; say why")
    if response.evidence_sha256 != request.evidence_sha256:
        return denial(
            "evidence",
            f"approved evidence {response.evidence_sha256[:12] or '(none)'}, but it is "
            f"{request.evidence_sha256[:12]} now; look at it again, then approve again ({could} may)",
        )
    if response.responder == request.requested_by and not rule.requester_may_approve:
        return denial("requester", f"asked for the release and may not approve it as well; {could} may")
    if rule.comment_to_approve and not response.comment.strip():
        return denial("comment", "approved without a comment, which this model needs")
    return None


def _deny_again(rule: ModelRule, request: ApprovalRequest, response: Response, given: Collection[Response]) -> Denial:
    name = response.responder
    others = f"; {_who_could(rule, request, given)} may" if len(given) < rule.min_approvals else ""
    return Denial(name, "once", f"{name}: has approved already, and counts once{others}")


def _who_could(rule: ModelRule, request: ApprovalRequest, given: Collection[Response]) -> str:
    """Those whose approval would count, as text."""
    out = {response.responder for response in given}
    if not rule.requester_may_approve:
        out.add(request.requested_by)
    if rule.approvers:
        able = [name for name in dict.fromkeys(rule.approvers) if name not in out]
        return " or ".join(able) if able else "nobody (add approvers to the promotion policy)"
    others = ", ".join(sorted(name for name in out if name))
    return f"anybody but {others}" if others else "anybody"
