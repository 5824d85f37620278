"""Recorded results of the authors' code: how each family's cases are run, in one module a family, named as its adapter.

Each has `compare(folder, checkpoint, comparison) -> Report`: load the checkpoint through its adapter, run every case
that the folder records, and hand what came out and what was recorded to the comparison.
"""
