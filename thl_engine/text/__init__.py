"""Strings and token ids: tokenizers, streams, chat templates, the sampler."""
