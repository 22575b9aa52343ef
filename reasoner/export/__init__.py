"""`python -m reasoner export`: what a run trained as files for other programs, loaded again and measured."""
