"""Ratios against peers that are measured in the same run: `python -m benchmarks.run`, from the root of the checkout."""
