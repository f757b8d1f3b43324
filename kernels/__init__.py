"""One operation per file: its torch reference, which also trains, and beside it the faster ways to compute it."""
