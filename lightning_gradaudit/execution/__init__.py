"""Where an audit runs: executors, Ray, shared memory and batching."""
