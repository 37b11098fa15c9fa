"""Corpora as byte arrays, what a compressor makes of them, and packing."""
