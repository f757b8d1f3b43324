"""The operations that models are written in, on each backend, and the choice among these."""
