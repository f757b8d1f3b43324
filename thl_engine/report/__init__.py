"""What people read: benchmarks and summaries of checkpoints."""
