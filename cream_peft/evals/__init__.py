"""Evaluation: tasks measured by length and depth, one JSON file a model."""

from .recall import recall
from .runner import evaluate, mean_by, read_results

TASKS = {"recall": recall}
"""name -> function(model, tokenizer, length, samples, seed) that yields cells: depth, metric, value, samples."""

__all__ = ["TASKS", "evaluate", "mean_by", "read_results"]
