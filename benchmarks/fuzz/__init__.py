"""Two thousand bad inputs, and what becomes of each: a line and exit code 2, or the right values.

`datasets.py`, `weights.py` and `runs.py` say what there is to read, `truth.py` what is right, `mutations.py`,
`fields.py` and `archives.py` how it is spoilt, `flags.py` what stands on a command line, `sandbox.py` what may not
happen meanwhile.
"""
