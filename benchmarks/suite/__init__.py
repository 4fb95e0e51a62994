"""All benchmarks as one: `python -m benchmarks`. What there is, how it runs, what it is compared with, what is told."""
