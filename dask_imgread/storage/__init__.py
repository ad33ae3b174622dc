"""File systems, and the requests to them."""
