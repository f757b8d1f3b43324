"""Bytes on disk: reading, checking, packing, converting and growing checkpoints."""
