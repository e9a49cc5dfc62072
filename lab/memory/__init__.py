"""Where the memory of a training run goes: by arithmetic, on tensors without storage, and on real tensors."""
