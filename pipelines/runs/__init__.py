"""A run's workspace: created, executed through DVC, published to MLflow, replayed."""
