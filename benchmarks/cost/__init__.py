"""What audits cost: time, memory, and the share of training."""
