"""One module per revision; what is written here is never changed again."""
