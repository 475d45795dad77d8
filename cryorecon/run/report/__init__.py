"""Reports: a job read back, what to doubt of it, and pages that say so."""
