"""Evaluation: tasks measured by length and depth, one JSON file per model."""
