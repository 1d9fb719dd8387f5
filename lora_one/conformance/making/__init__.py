"""The scripts that make the vectors. They need scipy and mpmath, and are not part of the wheel."""
