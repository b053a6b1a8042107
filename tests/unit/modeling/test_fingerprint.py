import numpy as np
import torch

from pipelines.modeling.fingerprint import fingerprint_training


def test_fingerprint_training__anything_it_depends_on_changes__is_another(training_workspace):
    def fingerprint(parameters: str = "a") -> str:
        return fingerprint_training(parameters, training_workspace.splits, training_workspace.features)

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint("b") != first
    images = np.load(training_workspace.splits / "train.npy")
    images[0, 0, 0, 0] ^= 1
    np.save(training_workspace.splits / "train.npy", images)
    second = fingerprint()
    assert second != first
    (training_workspace.features / "statistics.json").write_text("{}")
    third = fingerprint()
    assert third not in (first, second)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert fingerprint() != third
    finally:
        torch.set_num_threads(threads)


def test_fingerprint_training__test_split_changes__is_the_same(training_workspace):
    def fingerprint() -> str:
        return fingerprint_training("a", training_workspace.splits, training_workspace.features)

    first = fingerprint()
    np.save(training_workspace.splits / "test.npy", np.zeros(3, dtype=np.uint8))
    assert fingerprint() == first
