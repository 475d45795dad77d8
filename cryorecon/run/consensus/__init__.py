"""Consensus: how far jobs on the same particles agree, and what they agree on."""
