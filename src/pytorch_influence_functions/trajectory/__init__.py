"""Attribution along the training run."""
