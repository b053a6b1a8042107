"""What `perch predict` does: many images through one model into one Parquet file, in parallel and resumable."""
