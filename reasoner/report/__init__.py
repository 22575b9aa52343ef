"""The page a run leaves: what it gained, how, and what looks wrong, in one HTML file that needs nothing else."""
