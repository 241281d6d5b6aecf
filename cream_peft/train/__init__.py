"""Training: a recipe, its documents, the collator that draws positions, CREAMTrainer, and the run around them."""
