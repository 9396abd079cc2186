"""One training step as a pure function: snapshot, observation, sharing, replay and defences."""
