"""`params.yaml` as frozen, strict models: one class per section, every key with its meaning and its limits.

`load_params` is the one way in.  A mistake is refused with the key's path, the value and the limit, all mistakes at
once.  Where the file lies, and what a run overrides in it, is the business of `pipelines.runs`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipelines.errors import Refusal

Share = Annotated[float, Field(ge=0.0, le=1.0)]
_NAME_PATTERN = r"^[a-z0-9]+(?:[-_][a-z0-9]+)*$"
_LABEL_PATTERN = r"^[A-Za-z0-9./_-]+=[A-Za-z0-9._-]*$"
_TAINT_PATTERN = r"^[A-Za-z0-9./_-]+(=[A-Za-z0-9._-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?$"
_SHA256_PATTERN = r"^[0-9a-f]{64}$"
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 30.0  # between two calls of the release engine
Name = Annotated[str, Field(pattern=_NAME_PATTERN, max_length=100)]
NAME_IN_WORDS = "small letters and digits, with single - or _ between them"
# What a pattern asks for, for readers of errors and of the reference page.
PATTERNS_IN_WORDS = {
    _NAME_PATTERN: NAME_IN_WORDS,
    _SHA256_PATTERN: "64 hexadecimal digits in small letters",
    _LABEL_PATTERN: "a label as `key=value`",
    _TAINT_PATTERN: "a taint as `key=value:Effect`, `key:Effect` or `key`",
}


def _parse_date(value: object) -> object:
    """Strict mode takes no strings for dates, but JSON (the trigger form) has nothing else."""
    return date.fromisoformat(value) if isinstance(value, str) else value


def _widen_integer(value: object) -> object:
    """YAML writes 1 where 1.0 is meant; strict mode would refuse it for a float only when it is a bool."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


IsoDate = Annotated[date, BeforeValidator(_parse_date)]
Number = Annotated[float, BeforeValidator(_widen_integer)]


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values are not coerced, nothing changes after loading."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class TableParams(Section):
    """Column names of a table source; `null` where the table has no such column."""

    path_column: str = Field("path", description="Column with the image's path, relative to the table or absolute.")
    label_column: str = Field("label", description="Column with the class's name.")
    split_column: str | None = Field(None, description="Column with train, val or test, where the splits are given.")
    group_column: str | None = Field(None, description="Column whose equal values must share a split, e.g. a patient.")
    arrived_column: str | None = Field(None, description="Column with the date an image arrived, for `as_of`.")


class DataIngestionParams(Section):
    """What is read, and what is refused while reading."""

    source: str = Field(
        "digits",
        min_length=1,
        description="`digits`, a folder, a table, an .npz, an s3:// address of these, or an http(s):// one of an .npz.",
    )
    sha256: Annotated[str, Field(pattern=_SHA256_PATTERN)] | None = Field(
        None, description="Expected SHA-256 of an .npz; needed where it is fetched from an http(s):// address."
    )
    table: TableParams = TableParams()
    group_pattern: str | None = Field(
        None, description="Regular expression over an image's path; its first group names what must share a split."
    )
    as_of: IsoDate | None = Field(None, description="Take what had arrived by this date; null takes everything.")
    max_image_pixels: int = Field(100_000_000, ge=1, le=1_000_000_000, description="Pixels of one image.")
    max_image_bytes: int = Field(50_000_000, ge=1, le=2_000_000_000, description="Encoded bytes of one image.")
    max_quarantined_share: Share = Field(
        0.05,
        description="Share of unreadable images above which ingestion itself stops; a data set's own limit, usually "
        "tighter, is `quarantined_share` in its suite.",
    )
    shard_images: int = Field(1024, ge=16, le=65_536, description="Images in one Parquet shard, on average.")

    @field_validator("group_pattern")
    @classmethod
    def _pattern_has_a_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                groups = re.compile(value).groups
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from error
            if groups < 1:
                raise ValueError("needs one group in parentheses, e.g. person(\\d+)_")
        return value


class DataValidationParams(Section):
    """What validation needs beyond the suites in `expectations/`."""

    near_duplicate_bits: int = Field(
        2, ge=0, le=16, description="Largest distance between 64-bit perceptual hashes of near-duplicates."
    )


class DataPreprocessingParams(Section):
    """From encoded images to one uint8 array per split."""

    size_px: int = Field(28, ge=8, le=1024, description="Side of the square the network sees.")
    channels: Literal[1, 3] = Field(1, description="1 grey, 3 colour.")
    resize: Literal["squash", "pad", "crop"] = Field("squash", description="How an oblong image becomes square.")
    train_share: Share = Field(0.70, description="Share of the images to train on, where no splits are given.")
    val_share: Share = Field(
        0.15, description="Share that early stopping and tuning look at; the rest is the test split."
    )
    outlier_z: Number = Field(8.0, gt=0, description="Robust deviations from the class's median that are too many.")
    min_images_per_class: int = Field(2, ge=1, description="Images that each class must have in each split.")

    @model_validator(mode="after")
    def _shares_leave_a_test_split(self) -> DataPreprocessingParams:
        if self.train_share <= 0 or self.val_share <= 0 or self.train_share + self.val_share >= 1:
            raise ValueError(
                f"train_share {self.train_share} and val_share {self.val_share} must be above 0 and leave a test split"
            )
        return self


class FeatureEngineeringParams(Section):
    """Constants computed from the training split alone."""

    max_class_weight: Number = Field(10.0, ge=1, description="Cap on a rare class's weight in the loss.")


class SmallCNNParams(Section):
    """The network for small images."""

    widths: list[Annotated[int, Field(ge=4, le=1024)]] = Field(
        [32, 64, 128],
        min_length=1,
        max_length=6,
        description="Channels of each block; a block halves the image's side.",
    )
    dropout: Number = Field(0.2, ge=0, lt=1, description="Share of the last features dropped at random in training.")


class HuggingFaceParams(Section):
    """Any image classifier that `transformers` can load."""

    checkpoint: str = Field(
        "google/efficientnet-b4",
        min_length=1,
        description="A local folder, relative to that of params.yaml, or a hub name.",
    )
    pretrained: bool = Field(True, description="false builds the checkpoint's architecture with random weights.")


class AugmentationParams(Section):
    """Random changes of training images, safe for X-rays by default: nothing is mirrored unless asked."""

    shift: Share = Field(0.06, description="Largest shift, as a share of the image's side.")
    rotation_deg: Number = Field(8.0, ge=0, le=180, description="Largest rotation, either way.")
    scale: Number = Field(0.05, ge=0, lt=1, description="Largest change of size, as a share.")
    contrast: Number = Field(0.15, ge=0, lt=1, description="Largest change of contrast, as a share.")
    brightness: Number = Field(0.1, ge=0, lt=1, description="Largest change of brightness, as a share of full scale.")
    noise: Number = Field(0.0, ge=0, lt=1, description="Deviation of added noise, of full scale.")
    flip_horizontal: bool = Field(False, description="Mirror left and right; wrong where sides mean something.")
    flip_vertical: bool = Field(False, description="Mirror top and bottom.")


class ModelTrainingParams(Section):
    """The network, how it is trained, and what its export must satisfy."""

    network: Literal["small_cnn", "huggingface"] = Field("small_cnn", description="Which of the two networks below.")
    small_cnn: SmallCNNParams = SmallCNNParams()
    huggingface: HuggingFaceParams = HuggingFaceParams()
    epochs: int = Field(20, ge=1, le=1000, description="Passes over the training split, at most.")
    batch_size: int = Field(64, ge=1, le=4096, description="Images per step of the optimiser.")
    learning_rate: Number = Field(0.003, gt=0, le=1, description="Of AdamW; the schedule's peak.")
    weight_decay: Number = Field(0.01, ge=0, le=1, description="Of AdamW.")
    schedule: Literal["constant", "cosine", "one_cycle"] = Field(
        "one_cycle", description="Course of the learning rate over the epochs."
    )
    label_smoothing: Number = Field(0.05, ge=0, lt=1, description="Share of each label spread over all classes.")
    weight_averaging: Number = Field(
        0.99,
        ge=0,
        lt=1,
        description="Decay of the moving average of the weights that is evaluated and exported; 0 is off.",
    )
    class_weights: bool = Field(True, description="Weigh the loss so that rare classes count as much as common ones.")
    patience_epochs: int = Field(
        5,
        ge=1,
        description="Epochs without a better val/loss before training stops; those of the first 50 steps do not count.",
    )
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field("32-true", description="Lightning's precision.")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="Where to train; `auto` takes a GPU if any.")
    devices: int = Field(
        1, ge=1, le=64, description="Processes that train together, each on a GPU or on cores of its own."
    )
    augmentation: AugmentationParams = AugmentationParams()
    trials: int = Field(0, ge=0, le=1000, description="Optuna trials before the final training; 0 is off.")
    parallel_trials: int = Field(
        1, ge=1, le=64, description="Tasks that share the trials where `PERCH_TUNING_URL` names a database for them."
    )
    trial_epochs: int = Field(6, ge=1, le=1000, description="Epochs of one trial.")
    temperature_scaling: bool = Field(
        True, description="Fit how sure the exported model says it is to the validation split."
    )
    max_parity_difference: Number = Field(
        1e-3, gt=0, le=1, description="Largest difference of a probability between ONNX and PyTorch."
    )
    int8: bool = Field(True, description="Also try an int8 variant; kept only if it is faster and not worse.")
    min_int8_speedup: Number = Field(1.2, ge=1, description="How many times faster the int8 variant must be.")


class ModelEvaluationParams(Section):
    """The gate's numbers."""

    confidence: float = Field(0.95, ge=0.5, lt=1, description="Of every interval.")
    bootstrap_samples: int = Field(1000, ge=100, le=100_000, description="Resamples behind a bootstrap interval.")
    min_accuracy: Share = Field(0.85, description="Floor on the lower confidence bound of test accuracy.")
    max_accuracy_drop: Share = Field(
        0.05,
        description="Non-inferiority margin against the champion; about 200 test images prove 0.05, 930 prove 0.02.",
    )
    max_class_recall_drop: Share = Field(0.10, description="A class whose recall clearly drops by more blocks.")
    max_slice_accuracy_drop: Share = Field(0.10, description="A slice whose accuracy clearly drops by more blocks.")
    max_calibration_error: Share = Field(0.15, description="A calibration error that is clearly above blocks.")
    min_slice_images: int = Field(20, ge=1, description="Smaller slices are shown but not judged.")
    min_behaviour_agreement: Share = Field(
        0.90, description="Predictions that must survive harmless changes; clearly fewer block."
    )
    worst_errors: int = Field(12, ge=0, le=100, description="Pictures of the worst errors in the model card.")


class ModelRegistrationParams(Section):
    """How a model that passed is entered in the registry."""

    candidate_alias: Name = Field(
        "candidate",
        description="MLflow alias of the latest version that passed its gate and was not turned away in staging.",
    )


class DeployToStagingParams(Section):
    """What a release is asked before a person is; its latency is held against `model_release`'s limit."""

    golden_images: int = Field(100, ge=1, le=10_000, description="Test images whose served answers are compared.")
    max_probability_difference: Number = Field(
        1e-4, gt=0, le=1, description="Largest difference of a served probability from the evaluated one."
    )
    latency_requests: int = Field(200, ge=20, le=100_000, description="Requests, one after the other, that are timed.")
    probe_images: int = Field(
        500,
        ge=1,
        le=10_000,
        description="Test images kept beside the release for the prober, where model_release has one; 64 MB at most.",
    )


class ModelReleaseParams(Section):
    """The steps of a release, how long each lasts, and what its gates allow."""

    shadow: bool = Field(True, description="Begin with copies of requests, before any client gets the canary's answer.")
    canary_percents: list[Annotated[int, Field(ge=1, le=100)]] = Field(
        [10, 50, 100],
        min_length=1,
        max_length=20,
        description="Shares of the requests, one step each; the last is 100.",
    )
    min_step_s: Number = Field(600, ge=0, description="Seconds that each step lasts at least, whatever its gates say.")
    max_step_s: Number = Field(
        14_400, gt=0, description="Seconds after which a step whose gates still need data is rolled back."
    )
    max_error_rate: Share = Field(0.001, description="Share of the canary's requests that may fail.")
    max_p95_ms: Number = Field(
        500, gt=0, description="Milliseconds that 95 % of the canary's requests must stay below."
    )
    max_crashes: int = Field(0, ge=0, description="Worker processes of the canary that may end unasked in a step.")
    min_agreement: Number = Field(
        0.9, gt=0, lt=1, description="Share of mirrored requests on which the canary must give the champion's label."
    )
    min_label_agreement: Number = Field(0.5, gt=0, lt=1, description="The same, among each of the champion's labels.")
    max_label_shift: Number = Field(
        0.1, gt=0, lt=1, description="Share of predictions that may move from some labels to others."
    )
    max_score_difference: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        0.2, description="Mean total variation between both models' probabilities; null is not judged."
    )
    acceptable_share: Number = Field(
        0.2, gt=0, lt=1, description="Of the limit on errors: a canary at this error rate is surely promoted."
    )
    unacceptable_share: Number = Field(
        2.0, gt=1, description="Of the limit on errors: a canary at this error rate is surely rolled back."
    )
    wrong_rollback: Number = Field(
        0.05, gt=0, lt=0.5, description="Largest probability that a gate rolls back what is acceptable (alpha)."
    )
    wrong_promotion: Number = Field(
        0.05, gt=0, lt=0.5, description="Largest probability that a gate lets pass what is unacceptable (beta)."
    )
    max_requests: int = Field(
        20_000, ge=1, description="Canary requests without a verdict after which waiting on will hardly help."
    )
    max_blind_s: Number = Field(
        30, gt=0, description="Seconds for which a canary with requests may give no metrics before it is rolled back."
    )
    ready_timeout_s: Number = Field(180, gt=0, description="Seconds that a release has to become ready.")
    lease_s: Number = Field(15, gt=0, description="Seconds for which one process alone may move a release.")
    abandoned_after_s: Number = Field(
        120, gt=0, description="Seconds without a sign of the engine after which the watchdog takes the traffic away."
    )
    probe_requests_per_s: Number = Field(
        0,
        ge=0,
        le=1000,
        description="Most requests per second that a prober adds where clients send too few for a step; 0: no prober.",
    )
    count_probes: bool = Field(
        True, description="Whether the gates take the prober's requests as evidence; a crash by one always counts."
    )

    @property
    def pause_s(self) -> float:
        """Seconds between two calls of the engine: often enough for each of the rollout's own times, at least twice."""
        times = (self.min_step_s / 5, self.max_blind_s / 3, self.abandoned_after_s / 4)
        return max(_SHORTEST_PAUSE_S, min(_LONGEST_PAUSE_S, *times))

    @field_validator("canary_percents")
    @classmethod
    def _percents_rise_to_all(cls, value: list[int]) -> list[int]:
        if value != sorted(set(value)) or value[-1] != 100:
            raise ValueError("must rise and end with 100, e.g. [10, 50, 100]")
        return value

    @model_validator(mode="after")
    def _times_leave_room(self) -> ModelReleaseParams:
        if self.max_step_s <= self.min_step_s:
            raise ValueError(f"max_step_s {self.max_step_s:g} must be above min_step_s {self.min_step_s:g}")
        if self.abandoned_after_s <= self.lease_s:
            raise ValueError(f"abandoned_after_s {self.abandoned_after_s:g} must be above lease_s {self.lease_s:g}")
        return self


Label = Annotated[str, Field(pattern=_LABEL_PATTERN, max_length=380)]
Taint = Annotated[str, Field(pattern=_TAINT_PATTERN, max_length=400)]


class StepPodParams(Section):
    """What one step's pod asks for beyond, or instead of, what every pod does; null takes that."""

    cpu: int | None = Field(None, ge=1, le=256, description="Cores.")
    memory_mib: int | None = Field(None, ge=256, le=16_777_216, description="Memory.")
    disk_mib: int | None = Field(None, ge=256, le=16_777_216, description="Disk.")
    gpus: int | None = Field(None, ge=0, le=16, description="GPUs.")
    gpu_resource: str | None = Field(None, min_length=1, description="What the cluster calls a GPU.")
    node_selector: list[Label] | None = Field(None, description="Labels of the nodes.")
    tolerations: list[Taint] | None = Field(None, description="Taints of the nodes.")


class PodsParams(Section):
    """What steps ask of a cluster where `PERCH_RUNNER=kubernetes` runs them as pods; nothing that they compute."""

    cpu: int = Field(1, ge=1, le=256, description="Cores, and the threads that a step computes with.")
    memory_mib: int = Field(4096, ge=256, le=16_777_216, description="Memory; a pod that takes more is ended.")
    disk_mib: int = Field(20_480, ge=256, le=16_777_216, description="Disk for the step's part of the run.")
    gpus: int = Field(0, ge=0, le=16, description="GPUs.")
    gpu_resource: str = Field("nvidia.com/gpu", min_length=1, description="What the cluster calls a GPU.")
    node_selector: list[Label] = Field([], description="Labels of the nodes that pods may run on, as `key=value`.")
    tolerations: list[Taint] = Field(
        [], description="Taints that pods may run in spite of, as `key=value:Effect`, `key:Effect` or `key`."
    )
    steps: dict[Name, StepPodParams] = Field(
        {"model_training": StepPodParams(cpu=2, memory_mib=8192)},
        description="By step, any of the keys above that it wants otherwise; `trials` ask for what training does.",
    )

    def of_step(self, step: str) -> PodsParams:
        """What this step's pod asks for; trials ask for what training does, where nothing else is said."""
        if step == "trials" and step not in self.steps:
            step = "model_training"
        own = self.steps[step].model_dump(exclude_none=True) if step in self.steps else {}
        return self.model_copy(update={**own, "steps": {}})


class Params(Section):
    """The whole of `params.yaml`."""

    dataset: Name = Field(description="Names the data and the folder of its expectations.")
    model_name: Name = Field(description="The registered model's name, `<domain>-<task>`.")
    seed: int = Field(
        7, ge=0, le=2**31 - 1, description="Of every random choice: equal seeds give equal weights on a CPU."
    )
    data_ingestion: DataIngestionParams = DataIngestionParams()
    data_validation: DataValidationParams = DataValidationParams()
    data_preprocessing: DataPreprocessingParams = DataPreprocessingParams()
    feature_engineering: FeatureEngineeringParams = FeatureEngineeringParams()
    model_training: ModelTrainingParams = ModelTrainingParams()
    model_evaluation: ModelEvaluationParams = ModelEvaluationParams()
    model_registration: ModelRegistrationParams = ModelRegistrationParams()
    deploy_to_staging: DeployToStagingParams = DeployToStagingParams()
    model_release: ModelReleaseParams = ModelReleaseParams()
    pods: PodsParams = PodsParams()


def load_params(path: Path) -> Params:
    """Read and check a parameter file.

    Raises:
        Refusal: the file is missing, is not YAML, or has unknown keys or values outside their limits.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refusal(
            f"the parameter file {path}",
            error.strerror,
            way_out="start Perch in the folder of params.yaml, or set PERCH_PROJECT_DIR",
        ) from error
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refusal(
            f"the parameter file {path}", f"is not YAML: {error}", way_out="mend the line it names, or the one above it"
        ) from None
    return check_params(tree, name=str(path))


def check_params(tree: object, *, name: str = "params.yaml", own: Collection[str] = ()) -> Params:
    """Turn a parsed parameter tree into `Params`, or refuse it with every mistake named.

    Args:
        tree: what the file holds, with a run's own values in it.
        name: of the file, for the message.
        own: dotted keys whose value is the run's own (`--set`, `--conf`, the trigger form) and not the file's.

    Raises:
        Refusal: one line per mistake, each with the key's path, its value and the limit.
    """
    try:
        return Params.model_validate(tree)
    except ValidationError as error:
        mistakes = [(_path(detail), _explain(dict(detail))) for detail in error.errors(include_url=False)]
    are_own = [
        any(f"{path}.".startswith(f"{key}.") or key.startswith(f"{path}.") for key in own) for path, _ in mistakes
    ]
    if all(are_own):
        name = "the run's own values (--set, --conf or the trigger form)"
    mark = any(are_own) and not all(are_own)
    lines = [
        line + (" (the run's own value, not the file's)" if mark and is_own else "")
        for (_, line), is_own in zip(mistakes, are_own, strict=True)
    ]
    raise Refusal(name, "\n  " + "\n  ".join(lines), way_out="`perch params --schema` lists every key with its limits")


def override(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a parameter tree with dotted keys replaced, e.g. `{"model_training.epochs": 3}`.

    The keys are not checked here: `check_params` names an unknown one with its whole path.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    for dotted, value in overrides.items():
        head, _, rest = dotted.partition(".")
        if rest:
            section = result.get(head)
            result[head] = override(section if isinstance(section, Mapping) else {}, {rest: value})
        else:
            result[head] = value
    return result


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A parameter tree as dotted keys and values, as `override` takes them."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _path(detail: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _explain(detail: dict[str, Any]) -> str:
    """One mistake as `path: value …, limit …`, with the nearest known key for a misspelt one."""
    path = _path(detail)
    if detail["type"] == "extra_forbidden":
        near = _nearest_key(tuple(str(part) for part in detail["loc"]))
        return f"{path}: unknown key" + (f"; did you mean {near}?" if near else "")
    if detail["type"] == "missing":
        return f"{path}: missing"
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if detail["type"] == "string_pattern_mismatch":
        pattern = detail["ctx"]["pattern"]
        message = f"should be {PATTERNS_IN_WORDS.get(pattern, f'text that matches {pattern}')}"
    return f"{path}: value {detail['input']!r} {message}"


def _nearest_key(location: tuple[str, ...]) -> str:
    """The known key most like an unknown one: beside it first, then anywhere; empty where none is alike."""
    section = "".join(f"{part}." for part in location[:-1])
    places: dict[str, list[str]] = {}  # a key's last part to the whole keys that end in it
    for key in _dotted_keys(Params):
        places.setdefault(key.rpartition(".")[2], []).append(key)
    beside = [name for name, keys in places.items() if section + name in keys]
    if near := get_close_matches(location[-1], beside, n=1, cutoff=0.65):
        return section + near[0]
    near = get_close_matches(location[-1], places, n=1, cutoff=0.8)
    return " or ".join(places[near[0]]) if near else ""


def _dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the tree with its whole path, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _dotted_keys(field.annotation, f"{prefix}{name}.")
