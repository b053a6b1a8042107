import asyncio
from typing import Any

import numpy as np
import pytest

from serving.batching import Answer, TurnBatcher
from serving.predictor import Predictor
from serving.release import Release


def images(count: int) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), dtype=np.uint8))


async def ask_together(batcher: TurnBatcher, count: int) -> list[Answer]:
    return await asyncio.gather(*(batcher.predict(image) for image in images(count)))


def test_predict__several_in_one_turn__are_one_call_and_the_answers_of_one_by_one(release: Release) -> None:
    predictor = Predictor(release.model)
    calls: list[int] = []
    batcher = TurnBatcher(predictor.predict, max_images=8, observe=lambda _queue, _model, size: calls.append(size))
    together = asyncio.run(ask_together(batcher, 6))
    assert calls == [6]
    for answer, image in zip(together, images(6), strict=True):
        alone = predictor.predict(image[np.newaxis])[0]
        assert np.abs(np.asarray(answer.probabilities) - alone).max() <= 1e-6


def test_predict__more_than_one_call_takes__are_split_in_their_order(release: Release) -> None:
    calls: list[int] = []
    predictor = Predictor(release.model)
    batcher = TurnBatcher(predictor.predict, max_images=4, observe=lambda _queue, _model, size: calls.append(size))
    answers = asyncio.run(ask_together(batcher, 10))
    assert calls == [4, 4, 2]
    for answer, image in zip(answers, images(10), strict=True):
        assert answer.probabilities == predictor.predict(image[np.newaxis])[0].tolist()


def test_predict__turns_one_after_the_other__are_a_call_each(release: Release) -> None:
    calls: list[int] = []
    predictor = Predictor(release.model)
    batcher = TurnBatcher(predictor.predict, max_images=8, observe=lambda _queue, _model, size: calls.append(size))

    async def ask_twice() -> None:
        for image in images(2):
            await batcher.predict(image)

    asyncio.run(ask_twice())
    assert calls == [1, 1]


def test_predict__model_that_fails__fails_each_request_and_not_the_next_ones() -> None:
    failing = [True]

    def predict(batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if failing[0]:
            raise MemoryError
        return np.zeros((len(batch), 2), np.float32)

    batcher = TurnBatcher(predict, max_images=8, observe=lambda *_: None)

    async def ask() -> None:
        results = await asyncio.gather(*(batcher.predict(image) for image in images(3)), return_exceptions=True)
        assert [type(result) for result in results] == [MemoryError] * 3
        failing[0] = False
        assert (await batcher.predict(images(1)[0])).probabilities == [0.0, 0.0]

    asyncio.run(ask())


def test_predict__client_that_goes_away__leaves_the_others_their_answers(release: Release) -> None:
    batcher = TurnBatcher(Predictor(release.model).predict, max_images=8, observe=lambda *_: None)

    async def ask() -> None:
        gone, stays = (asyncio.ensure_future(batcher.predict(image)) for image in images(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert len((await stays).probabilities) == 2
        with pytest.raises(asyncio.CancelledError):
            await gone

    asyncio.run(ask())
