"""What a model can do: perplexities, tasks, size and speed."""
