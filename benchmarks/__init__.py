"""How fast dask_imgread is, as ratios to the floor and to its peers."""
