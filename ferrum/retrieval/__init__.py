"""Documents that workflows may read: indexes of them, and searches in these."""

from ferrum.retrieval.documents import LeftOut, Original, read
from ferrum.retrieval.indexes import Added, Indexes

__all__ = ["Added", "Indexes", "LeftOut", "Original", "read"]
