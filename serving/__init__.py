"""The prediction service built from a registered model."""
