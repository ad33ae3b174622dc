"""Batch jobs that go on where they stopped."""
