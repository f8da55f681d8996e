"""METALM: language models as general-purpose interfaces (arXiv 2206.06336)."""

__version__ = "0.1.0"
