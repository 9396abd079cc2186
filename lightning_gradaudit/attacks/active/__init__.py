"""What an active adversary does: weights that a dishonest server sends."""
