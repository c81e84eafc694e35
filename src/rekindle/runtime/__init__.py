"""Keep, evict and recompute for real."""
