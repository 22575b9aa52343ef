"""Copies of a run's numbers for outside services; the run's own files, written by run_folder.py, are no tracker."""

from reasoner.tracking.background import close_all
from reasoner.tracking.base import Tracker, make_trackers

__all__ = ["Tracker", "close_all", "make_trackers"]
