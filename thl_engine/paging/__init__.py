"""Bytes in motion: the plan, the ring, the pager, the reader and the way to a device."""
