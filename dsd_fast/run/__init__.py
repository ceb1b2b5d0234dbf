"""What keeps a run: its state, optimizer, checkpoints, outputs, progress and memory."""
