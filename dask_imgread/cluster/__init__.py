"""Dask clusters: workers, tasks in flight, and the GPU shares that readers hold."""
