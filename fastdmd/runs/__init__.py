"""What a command does with a machine, a disk and a terminal."""
