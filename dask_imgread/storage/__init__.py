"""File systems and stores: paths, requests, secrets."""
