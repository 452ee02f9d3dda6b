"""What is learned: one file a task, found by its name."""
