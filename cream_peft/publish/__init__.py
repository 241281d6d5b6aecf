"""An adapter leaves the house: the model card, the merge, the push to the Hub."""
