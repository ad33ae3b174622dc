"""What is done with chosen rows of a metadata frame."""
