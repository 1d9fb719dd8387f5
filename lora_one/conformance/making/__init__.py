"""How the vectors are made. Needs scipy and mpmath, and is not part of the wheel."""
