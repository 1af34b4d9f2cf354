"""What torchrun starts: the entry, the data, the step, the CPU backend; and the launcher that starts it."""
