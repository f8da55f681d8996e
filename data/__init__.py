"""Samples, shards, streams, tokenizers and the layouts of tasks."""
