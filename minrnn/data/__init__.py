"""From text on disk to batches. Nothing here knows of a model."""
