"""Objectives: a batch's loss as a head over boundary values. They know no model family."""
