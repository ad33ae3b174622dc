"""The workers, and what of a GPU their readers hold."""
