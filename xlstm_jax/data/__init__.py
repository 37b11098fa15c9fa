"""Corpora as byte arrays, and what a compressor makes of them."""
