"""Jobs of multireference alignment in one dimension."""
