"""Measures the package beside the database alone: `python benchmarks/run.py`. Also the app that is measured."""
