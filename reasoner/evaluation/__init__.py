"""`python -m reasoner eval`: held-out accuracy of a run's checkpoints or of a model, and two runs compared from their
files."""
