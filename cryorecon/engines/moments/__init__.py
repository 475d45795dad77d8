"""Engine moments: what moments are, the sums they come from, and maps fitted to them."""
