"""The page that an approver reads before answering, as Markdown; and the two marks in it that bind the answer.

It answers in this order: what is asked, is it better, is it safe to serve, what will the rollout need, who may answer;
then the model card.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MARKS = re.compile(r"^Rollout `([^`\n]+)` · evidence `([0-9a-f]{64})`$", re.MULTILINE)
NO_FORECAST = "no forecast could be made"
FIRST_RELEASE = "nothing: there is no champion to compare it with, so it takes all requests once it is ready"
_MOST_CARD_CHARACTERS = 30_000
_NUMBERS = (  # in metrics.json: of a model, of the difference, a person's word, whether more is better
    ("accuracy", "accuracy_difference", "accuracy", True),
    ("f1", "f1_difference", "F1", True),
    ("log_loss", "log_loss_difference", "log loss", False),
)


@dataclass(frozen=True)
class PageFacts:
    """What the page says.

    Attributes:
        model: name of the registered model.
        version: that is to be released.
        champion: version that it would replace; empty for the first release of all.
        rollout_id: names the rollout.
        evidence_sha256: of all that an approval rests on.
        requested_by: who asked for the release.
        rule: who may answer, until when, as a sentence.
        verdict: tree of `evaluation/verdict.json`.
        metrics: tree of `evaluation/metrics.json`.
        staging: what staging showed, as a sentence.
        forecast: one sentence for each step of the rollout.
        links: title to address.
        card: the model card as Markdown.
    """

    model: str
    version: str
    champion: str
    rollout_id: str
    evidence_sha256: str
    requested_by: str
    rule: str
    verdict: Mapping[str, Any]
    metrics: Mapping[str, Any]
    staging: str
    forecast: Sequence[str]
    links: Mapping[str, str]
    card: str


def render_subject(facts: PageFacts) -> str:
    """The headline: what is asked, and the one number."""
    accuracy = facts.metrics["overall"]["accuracy"]["value"]
    against = f"in place of v{facts.champion}" if facts.champion else "as its first release"
    return f"Release {facts.model} v{facts.version} {against}? Accuracy {accuracy:.3f}"


def render_page(facts: PageFacts) -> str:
    """The whole page.  Its marks stand alone in their line, once; `read_marks` takes no other."""
    checks = facts.verdict["checks"]
    judged = [check for check in checks if check["judged"]]
    passed = sum(check["passed"] for check in judged)
    lines = [
        f"**{facts.model} v{facts.version} passed {passed} of {len(judged)} checks.** {facts.staging}",
        "",
        *_numbers(facts),
        "",
        "**What the rollout will need**",
        "",
        *(f"- {sentence}" for sentence in facts.forecast or [NO_FORECAST if facts.champion else FIRST_RELEASE]),
        "",
        f"Asked for by {facts.requested_by or 'nobody by name'}. {facts.rule} To reject, say why in the comment.",
        "",
        " · ".join(f"[{title}]({address})" for title, address in facts.links.items()),
        "",
        f"Rollout `{facts.rollout_id}` · evidence `{facts.evidence_sha256}`",
        "",
        "---",
        "",
        _MARKS.sub("(a line like the one above)", _cut(facts.card)),
    ]
    return "\n".join(lines)


def read_marks(body: str) -> tuple[str, str]:
    """Rollout and evidence that a page names; empty where it names none, or more than one."""
    found = _MARKS.findall(body)
    return found[0] if len(found) == 1 else ("", "")


def compare_numbers(metrics: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Three numbers beside the champion's, measured on the same images.

    Args:
        metrics: tree of `evaluation/metrics.json`.

    Returns:
        Name, the model's value, the champion's, and the difference in words.
    """
    overall, reference = metrics["overall"], metrics["reference"]
    rows = []
    for name, difference, word, more_is_better in _NUMBERS:
        mine, theirs, paired = overall.get(name), reference.get("reference", {}).get(name), reference.get(difference)
        if mine is None:
            continue
        change = "none yet"
        if paired:
            better = (paired["value"] > 0) == more_is_better
            unclear = paired["low"] <= 0 <= paired["high"]
            which = "no clear difference" if unclear else "better" if better else "worse"
            change = f"{paired['value']:+.3f} [{paired['low']:+.3f}, {paired['high']:+.3f}], {which}"
        value = f"{mine['value']:.3f} [{mine['low']:.3f}, {mine['high']:.3f}]"
        rows.append((word, value, f"{theirs['value']:.3f}" if theirs else "none yet", change))
    return rows


def _numbers(facts: PageFacts) -> list[str]:
    version = facts.metrics["reference"].get("version")
    beside = f"v{version}" if version else "champion"
    return [
        f"| {facts.metrics['images']:,} test images | v{facts.version} | {beside} | difference |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in compare_numbers(facts.metrics)),
    ]


def _cut(card: str) -> str:
    if len(card) <= _MOST_CARD_CHARACTERS:
        return card
    return f"{card[:_MOST_CARD_CHARACTERS]}\n\n(The rest of the card is behind the link above.)"
