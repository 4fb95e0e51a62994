"""Networks as denoisers: ours, anybody's, and the files that hold their weights."""
