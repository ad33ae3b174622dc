"""Tar shards: found, opened, walked and divided."""
