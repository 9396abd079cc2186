"""What is taken from a running Trainer: which hook sees which gradient."""
