"""Encoded bytes in, RGB pixels out: headers, decoders, and the memory that pixels lie in."""
