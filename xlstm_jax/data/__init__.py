"""Data by name, tokenisers, token files, windows and packing; corpora as bytes and what a compressor makes of them."""
