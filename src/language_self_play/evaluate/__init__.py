"""Measuring a model: accuracy on questions with known answers."""
