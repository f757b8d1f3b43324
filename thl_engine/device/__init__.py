"""The memory of a card."""
