"""The model card: one page to decide from, as HTML that needs no other file, and as Markdown."""

from __future__ import annotations

import re
from dataclasses import dataclass

import jinja2
from markupsafe import Markup, escape

from pipelines.core.calibration import reliability
from pipelines.core.gates import GateCheck, Verdict
from pipelines.core.statistics import Interval
from pipelines.modeling.card_facts import DataChange, ModelFacts, SuiteFacts
from pipelines.modeling.comparison import Comparison
from pipelines.modeling.evaluation import Evaluation
from pipelines.modeling.figures import data_uri, draw_confusion, draw_reliability, enlarge

MAX_TABLE_CLASSES = 12  # a larger confusion matrix is shown as a picture
_ERROR_PX = 168
_MOST_DIGITS = 5
_MOST_NAMED_FAILURES = 6
_MINUS = "\u2212"
_NOTHING = "\u2013"


@dataclass(frozen=True)
class WrongPrediction:
    """One of the worst errors, with what the reference made of it."""

    picture: str
    key: str
    true: str
    predicted: str
    confidence: float
    reference: str


@dataclass(frozen=True)
class SideBySide:
    """One measure of the model and of the reference on the same images; the difference only where it was tested."""

    name: str
    model: Interval
    reference: Interval
    difference: Interval | None
    smaller_is_better: bool = False


@dataclass(frozen=True)
class ModelCard:
    """Everything that a card shows; see the templates for the order.

    Attributes:
        model_name: the registered model's name.
        dataset: the data's name.
        evaluation: the measurements.
        verdict: the gate's answer.
        data: what changed in the data.
        model: how the model came about.
        suites: what the data was checked for.
        evidence_sha256: of metrics, verdict and model together.
        worst_errors: how many pictures to show.
    """

    model_name: str
    dataset: str
    evaluation: Evaluation
    verdict: Verdict
    data: DataChange
    model: ModelFacts
    suites: SuiteFacts
    evidence_sha256: str
    worst_errors: int

    def figures(self) -> dict[str, bytes]:
        """File names and PNG bytes for `evaluation/figures`."""
        evaluation = self.evaluation
        confidence = evaluation.probabilities.max(axis=1)
        return {
            "confusion.png": draw_confusion(evaluation.confusion, evaluation.labels),
            "reliability.png": draw_reliability(reliability(confidence, evaluation.predicted == evaluation.data.truth)),
        }

    def render_html(self, figures: dict[str, bytes]) -> str:
        """The page, with the figures inside."""
        return self._render("model_card.html.j2", {name: data_uri(png) for name, png in figures.items()})

    def render_markdown(self) -> str:
        """The same decision in text, for a message or a terminal; pictures are left to the page."""
        text = self._render("model_card.md.j2", {})
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    def _render(self, template: str, figures: dict[str, str]) -> str:
        judged = [check for check in self.verdict.checks if check.judged]
        return (
            _environment()
            .get_template(template)
            .render(
                card=self,
                evaluation=self.evaluation,
                comparison=self.evaluation.comparison,
                paired=self.evaluation.paired,
                scores=self.evaluation.scores,
                verdict=self.verdict,
                judged=judged,
                unjudged=len(self.verdict.checks) - len(judged),
                checks={check.name: check for check in self.verdict.checks},
                side_by_side={row.name: row for row in _side_by_side(self.evaluation)},
                wrong=_wrong_predictions(self.evaluation, self.worst_errors),
                errors=int((self.evaluation.predicted != self.evaluation.data.truth).sum()),
                show_confusion=len(self.evaluation.labels) <= MAX_TABLE_CLASSES,
                slice_checks=_slice_checks(self.evaluation, self.verdict),
                scale=_scale(self.evaluation),
                figures=figures,
                most_named=_MOST_NAMED_FAILURES,
            )
        )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipelines.modeling"),
        autoescape=jinja2.select_autoescape(("html.j2",)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": format_number,
        "estimate": format_estimate,
        "interval": format_interval,
        "points": format_points,
        "difference": format_difference,
        "check": format_check,
        "outcome": describe_outcome,
        "bytes": _format_bytes,
        "md": escape_markdown,
        "sentence": _begin_sentence,
        "breakable": _make_breakable,
    }
    return environment


def format_number(value: float | None, digits: int = 3) -> str:
    """`0.963`, with a real minus sign, and a dash for what is not known."""
    return _NOTHING if value is None else f"{value:.{digits}f}".replace("-", _MINUS)


def format_estimate(value: float | None, digits: int = 3) -> str:
    """As `format_number`, but `0.9996` does not become `1.000`: only what is perfect looks perfect."""
    if value is None or value >= 1:
        return format_number(value, digits)
    while round(value, digits) == 1 and digits < _MOST_DIGITS:
        digits += 1
    return format_number(min(value, 1 - 10**-digits), digits)


def format_interval(interval: Interval | None, digits: int = 3) -> str:
    """`0.963 [0.926, 0.985]`."""
    if interval is None:
        return _NOTHING
    low, high = format_number(interval.low, digits), format_number(interval.high, digits)
    return f"{format_estimate(interval.value, digits)} [{low}, {high}]"


def format_points(value: float | None) -> str:
    """A difference of shares in percentage points: `+0.7`."""
    if value is None:
        return _NOTHING
    text = f"{100 * value:+.1f}".replace("-", _MINUS)
    return "0.0" if text in ("+0.0", f"{_MINUS}0.0") else text


def format_difference(interval: Interval) -> str:
    """`+0.7 points [-1.1, +2.6]`."""
    low, high = format_points(interval.low), format_points(interval.high)
    return f"{format_points(interval.value)} points [{low}, {high}]"


def format_check(check: GateCheck) -> str:
    """A check's numbers, drops in points: `+0.7 points [-1.1, +2.6]`."""
    if check.value is None:
        return _NOTHING
    interval = None if check.low is None or check.high is None else Interval(check.value, check.low, check.high)
    if check.limit is not None and check.limit <= 0:
        return format_points(check.value) + " points" if interval is None else format_difference(interval)
    if interval is None:
        return f"{check.value:.2g}"
    return format_interval(interval)


def describe_outcome(check: GateCheck) -> str:
    """A check's outcome, so that an interval that reaches over its limit does not look like a failure."""
    if not check.judged:
        return "not judged"
    if not check.passed:
        return "failed"
    low, high, limit = check.low, check.high, check.limit
    reaches_over = low is not None and high is not None and limit is not None and low < limit < high
    return "passed, within chance" if reaches_over else "passed"


def escape_markdown(text: object) -> str:
    """Text of unknown origin, such as a class's name, as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>!|~$&]|^[-+#])", r"\\\1", " ".join(str(text).split()))


def _make_breakable(text: object) -> Markup:
    """Let a long path break after a slash or an underscore."""
    escaped = str(escape(text))
    return Markup(re.sub(r"([/_])", r"\1<wbr>", escaped))  # noqa: S704 - escaped just above


def _begin_sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def _side_by_side(evaluation: Evaluation) -> list[SideBySide]:
    paired = evaluation.paired
    if paired is None:
        return []
    model, reference = paired.scores, paired.reference_scores
    rows = [
        SideBySide("accuracy", model.accuracy, reference.accuracy, paired.accuracy_difference),
        SideBySide("F1", model.f1, reference.f1, paired.f1_difference),
        SideBySide("precision", model.precision, reference.precision, None),
        SideBySide("recall", model.recall, reference.recall, None),
    ]
    if model.roc_auc and reference.roc_auc:
        rows.append(SideBySide("ROC AUC", model.roc_auc, reference.roc_auc, None))
    return [
        *rows,
        SideBySide("calibration error", model.calibration_error, reference.calibration_error, None, True),
        SideBySide("log loss", model.log_loss, reference.log_loss, paired.log_loss_difference, True),
    ]


def _wrong_predictions(evaluation: Evaluation, most: int) -> list[WrongPrediction]:
    data, labels = evaluation.data, evaluation.labels
    asked = {int(row): position for position, row in enumerate(evaluation.comparison.rows)}
    found = []
    for row in evaluation.worst_errors(most).tolist():
        predicted = int(evaluation.predicted[row])
        found.append(
            WrongPrediction(
                picture=data_uri(enlarge(data.images[row], _ERROR_PX)),
                key=str(data.table["key"].iloc[row]),
                true=labels[int(data.truth[row])],
                predicted=labels[predicted],
                confidence=float(evaluation.probabilities[row, predicted]),
                reference=_reference_answer(evaluation.comparison, labels, asked.get(row)),
            )
        )
    return found


def _reference_answer(comparison: Comparison, labels: tuple[str, ...], position: int | None) -> str:
    return "" if position is None else labels[int(comparison.probabilities[position].argmax())]


def _slice_checks(evaluation: Evaluation, verdict: Verdict) -> list[GateCheck]:
    """The check of each slice, in the order of the slices."""
    by_name = {check.name: check for check in verdict.checks}
    return [by_name[f"{part.kind} {part.name} accuracy drop"] for part, _ in evaluation.slices]


def _scale(evaluation: Evaluation) -> tuple[float, float]:
    """Where the bars begin and end: from the lowest limit, rounded down to a tenth, to 1."""
    lows = [evaluation.scores.accuracy.low, 0.9]
    lows += [scores.accuracy.low for _, scores in evaluation.slices]
    lows += [scores.recall.low for scores in evaluation.classes if scores.recall]
    return (int(10 * min(lows)) / 10, 1.0)
