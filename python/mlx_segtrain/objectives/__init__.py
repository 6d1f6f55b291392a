"""Objectives: what a batch's loss is, as a head over the last boundary value. Never a model family."""
