"""Looking at what the models do: comparisons, evaluation, experiments."""
