"""Functions that score completions, built in or the user's own, run in worker processes. Loads no torch."""
