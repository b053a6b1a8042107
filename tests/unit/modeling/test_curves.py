from pipelines.modeling.curves import write_curves


def test_write_curves__two_epochs__one_row_per_metric(tmp_path):
    write_curves(tmp_path / "curves.csv", [{"val/loss": 0.1, "lr": 1e-3}, {"val/loss": 1 / 3, "lr": 1e-4}])
    assert (tmp_path / "curves.csv").read_text() == (
        "epoch,metric,value\n1,lr,0.001\n1,val/loss,0.1\n2,lr,0.0001\n2,val/loss,0.333333333\n"
    )
