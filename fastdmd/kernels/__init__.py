"""The ops in Triton: one file per op, kernel and launcher. Nothing is imported here, so that Triton stays optional."""
