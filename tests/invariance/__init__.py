"""The invariance matrix: every objective under every split of model and mini-batch, against one sequence at a time.

cases.py says what is varied, data.py makes the mini-batch and the float64 reference, run.py is what each rank does,
table.py writes docs/invariance.md. ``python -m invariance`` (with tests/ on the path) runs it all.
"""
