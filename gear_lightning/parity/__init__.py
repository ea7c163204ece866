"""Whether runs under several strategies are equal but for rounding."""
