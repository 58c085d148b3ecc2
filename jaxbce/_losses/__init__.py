"""The losses, one file each: formula, derivatives, value, public functions."""
