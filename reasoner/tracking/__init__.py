"""Copies of a run's numbers for outside services; the run's own files, written by run_folder.py, are no tracker."""

from reasoner.tracking.base import Tracker, make_trackers

__all__ = ["Tracker", "make_trackers"]
