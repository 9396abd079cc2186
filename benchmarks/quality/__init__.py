"""What attacks recover, and what predicts it."""
