"""One thin module per stage of `dvc.yaml`: `run(params, workspace) -> Result`."""
