import pytest
import torch

from pipelines.modeling.callbacks import FINGERPRINT_KEY, EpochHistory, MovingAverage, find_checkpoint


def history_of(*losses: float, patience: int = 2) -> EpochHistory:
    history = EpochHistory(patience)
    history.records = [{"val/loss": loss} for loss in losses]
    history.best_epoch = losses.index(min(losses)) + 1 if losses else 0
    return history


@pytest.mark.parametrize(
    ("losses", "expected"),
    [((3.0,), False), ((3.0, 2.0, 2.5), False), ((3.0, 2.0, 2.5, 2.2), True), ((3.0, 2.0, 2.5, 1.9), False)],
)
def test_epoch_history__epochs_since_the_best__use_up_patience(losses, expected):
    assert history_of(*losses).out_of_patience is expected


@pytest.mark.parametrize(("unsettled", "expected"), [(1, True), (2, True), (3, False), (4, False)])
def test_epoch_history__epochs_that_say_little__use_up_no_patience(unsettled, expected):
    history = history_of(3.0, 4.0, 5.0, 6.0)
    history.unsettled_epochs = unsettled
    assert history.out_of_patience is expected


def test_epoch_history__state_loaded__is_the_same_history():
    history = history_of(3.0, 2.0)
    history.best_weights = {"w": torch.ones(2)}
    history.unsettled_epochs = 1
    restored = EpochHistory(2)
    restored.load_state_dict(history.state_dict())
    assert (restored.records, restored.best_epoch, restored.unsettled_epochs) == (history.records, 2, 1)
    assert torch.equal(restored.best_weights["w"], torch.ones(2))


def test_find_checkpoint__same_fingerprint__is_found(tmp_path):
    torch.save({FINGERPRINT_KEY: "mine"}, tmp_path / "a.ckpt")
    assert find_checkpoint(tmp_path / "a.ckpt", "mine") == tmp_path / "a.ckpt"


def test_find_checkpoint__other_fingerprint_torn_or_missing__is_none(tmp_path):
    file = tmp_path / "a.ckpt"
    assert find_checkpoint(file, "mine") is None
    torch.save({FINGERPRINT_KEY: "mine", "weights": torch.rand(1000)}, file)
    assert find_checkpoint(file, "other") is None
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        assert find_checkpoint(file, "mine") is None


def test_find_checkpoint__a_pickle_that_runs_code__is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("trapped").touch, ())

    torch.save({FINGERPRINT_KEY: "mine", "trap": Trap()}, tmp_path / "a.ckpt")
    assert find_checkpoint(tmp_path / "a.ckpt", "mine") is None
    assert not (tmp_path / "trapped").exists()


def average(decay: float, old: torch.Tensor, new: torch.Tensor, steps: int) -> torch.Tensor:
    return MovingAverage(decay)._kwargs["avg_fn"](old, new, steps)


def test_moving_average__constant__stays_exact():
    constant = torch.rand(1000)
    assert torch.equal(average(0.999, constant, constant, 50), constant)


def test_moving_average__many_steps__keeps_the_decay_s_share():
    assert average(0.9, torch.tensor(1.0), torch.tensor(0.0), 10_000).item() == pytest.approx(0.9)


def test_moving_average__few_steps__forgets_the_beginning():
    assert average(0.9, torch.tensor(1.0), torch.tensor(0.0), 0).item() == pytest.approx(0.1)


def test_moving_average__counter__follows_the_latest():
    assert average(0.9, torch.tensor(3), torch.tensor(7), 100).item() == 7
