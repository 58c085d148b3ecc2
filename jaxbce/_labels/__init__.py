"""Label ids to multi-hot and back; the balance of the two classes."""
