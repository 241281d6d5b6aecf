"""Evaluation: tasks measured by length and depth, one JSON file a model."""

from .kv_retrieval import kv_retrieval
from .longchat_lines import longchat_lines
from .multikey_needle import multikey_needle
from .needle import needle
from .passkey import passkey
from .perplexity import perplexity
from .recall import recall
from .results import Results, file_name, mean_by

read_results = Results.read

TASKS = {
    "kv_retrieval": kv_retrieval,
    "longchat_lines": longchat_lines,
    "multikey_needle": multikey_needle,
    "needle": needle,
    "passkey": passkey,
    "perplexity": perplexity,
    "recall": recall,
}
"""name -> function(model, tokenizer, length, samples, seed, done=depths, **options) that yields cells: depth, metric,
value, samples. Written out after each."""

__all__ = ["TASKS", "file_name", "mean_by", "read_results"]
