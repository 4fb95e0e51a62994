"""The report of a run, or of several: one page, with nothing to fetch and nothing to run."""
