"""Questions to a language model, asked while workers are busy with batches."""
