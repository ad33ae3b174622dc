"""Batch jobs, resumed where they stopped."""
