"""Networks, training, export and evaluation."""
