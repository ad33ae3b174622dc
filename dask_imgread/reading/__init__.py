"""Shards in, batches of decoded images out."""
