"""What a run tells the world: its own files first, copies to trackers in the background."""
