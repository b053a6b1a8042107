import asyncio
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.core.image_decoding import read_model_input
from serving.classification import Classification, Classifier
from serving.predictor import Predictor
from serving.problems import (
    BAD_REQUEST,
    OUT_OF_TIME,
    TOO_LARGE,
    TOO_MANY_PIXELS,
    UNREADABLE_IMAGE,
    UNSUPPORTED_MEDIA,
    Problem,
    ProblemType,
)
from serving.release import Release
from tests.unit.serving.conftest import MakeImage


@pytest.fixture
def predictor(release: Release) -> Predictor:
    return Predictor(release.model)


@pytest.fixture
def classifier(predictor: Predictor) -> Iterator[Classifier]:
    classifier = make_classifier(predictor)
    yield classifier
    classifier.close()


def make_classifier(predictor: Predictor, *, model_s: float = 0.0001, timeout_s: float = 5.0) -> Classifier:
    return Classifier(
        predictor,
        model_s=model_s,
        max_pixels=10_000,
        max_bytes=50_000,
        timeout_s=timeout_s,
        threads=1,
        observe=lambda *_: None,
    )


def test_classify__an_image__gives_what_the_model_says_of_the_shared_decoding(
    classifier: Classifier, predictor: Predictor, make_image: MakeImage
) -> None:
    data = make_image()
    answer = asyncio.run(classifier.classify(data))
    array = read_model_input(data, predictor.contract.input, max_pixels=10_000, max_bytes=50_000)
    expected = predictor.predict(array[np.newaxis])[0]
    assert answer.probabilities == expected.tolist()
    assert answer.label_index == int(expected.argmax())
    assert (answer.image.format, answer.image.mode, answer.image.width_px) == ("PNG", "L", 12)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", BAD_REQUEST),
        (b"hello", UNSUPPORTED_MEDIA),
        (b"%PDF-1.7" + bytes(200), UNSUPPORTED_MEDIA),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), UNREADABLE_IMAGE),
        (b"\xff\xd8\xff" + bytes(100), UNREADABLE_IMAGE),
    ],
)
def test_classify__bytes_that_are_no_image__are_a_problem_by_their_kind(
    classifier: Classifier, data: bytes, kind: ProblemType
) -> None:
    with pytest.raises(Problem) as caught:
        asyncio.run(classifier.classify(data))
    assert caught.value.kind is kind


def test_classify__too_many_pixels_or_bytes__names_found_and_limit(
    classifier: Classifier, make_image: MakeImage
) -> None:
    with pytest.raises(Problem, match=r"101 x 101 = 10,201 pixels \(limit: 10,000\)") as caught:
        asyncio.run(classifier.classify(make_image(101)))
    assert caught.value.kind is TOO_MANY_PIXELS
    with pytest.raises(Problem, match=r"limit: 50,000") as caught:
        asyncio.run(classifier.classify(make_image(90) + bytes(50_000)))
    assert caught.value.kind is TOO_LARGE


def test_classify__quick_model_and_small_image__stays_in_the_event_loop(
    predictor: Predictor, make_image: MakeImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    predict = predictor.predict
    monkeypatch.setattr(
        predictor, "predict", lambda images: threads.append(threading.current_thread().name) or predict(images)
    )
    for model_s, image_format in ((0.0001, "PNG"), (0.0001, "BMP"), (0.1, "PNG")):
        classifier = make_classifier(predictor, model_s=model_s)
        asyncio.run(classifier.classify(make_image(image_format=image_format)))
        classifier.close()
    assert threads[0] == "MainThread"
    assert all(name.startswith("classify") for name in threads[1:])


def test_classify_many__some_broken__fail_alone_and_in_their_place(
    classifier: Classifier, make_image: MakeImage
) -> None:
    items = [make_image(seed=seed) for seed in range(12)]
    items[3] = b"no image"
    items[9] = items[9][:-60]
    answers = asyncio.run(classifier.classify_many(items))
    assert [index for index, answer in enumerate(answers) if isinstance(answer, Problem)] == [3, 9]
    alone = asyncio.run(classifier.classify(items[11]))
    together = answers[11]
    assert isinstance(together, Classification)
    assert together.probabilities == alone.probabilities


def test_run__work_that_takes_too_long__is_a_503_and_what_waits_behind_it_never_begins(predictor: Predictor) -> None:
    classifier = make_classifier(predictor, timeout_s=0.05)
    begun: list[str] = []
    release = threading.Event()

    async def both() -> None:
        async def expect_late(name: str) -> None:
            with pytest.raises(Problem) as caught:
                await classifier.run(lambda: (begun.append(name), release.wait(60)))
            assert caught.value.kind is OUT_OF_TIME
            assert caught.value.headers["Retry-After"] == "1"

        await asyncio.gather(expect_late("first"), expect_late("second"))
        release.set()

    started = time.monotonic()
    asyncio.run(both())
    assert time.monotonic() - started < 30
    assert begun == ["first"]
    classifier.close()


def test_classify_many__images_that_fail__are_held_by_nothing_once_answered(classifier: Classifier) -> None:
    answers = asyncio.run(classifier.classify_many([b"text", b"\x89PNG\r\n\x1a\n??"]))
    for answer in answers:
        assert isinstance(answer, Problem)
        # Frames of a traceback hold their locals: the bytes, and in a circle the list of answers.
        assert answer.__traceback__ is None
        assert answer.__cause__ is None
        assert answer.__context__ is None
