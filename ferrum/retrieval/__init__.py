"""Documents that workflows may read: indexes of them, and searches in these."""
