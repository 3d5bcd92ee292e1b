"""The training step as one graph: its operations, how often each happens, and what they cost."""
