"""Where an audit runs: executors, Ray and shared memory."""
