"""Images in: where they come from, how they are transformed, and how they become batches."""
