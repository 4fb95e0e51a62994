"""The tests: a folder for each of the package's, and for what stands beside it; helpers, and golden values."""
