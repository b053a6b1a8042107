"""S3 and what speaks its protocol: one set of settings, one client, transfers that notice what was lost on the way."""
