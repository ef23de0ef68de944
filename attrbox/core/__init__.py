"""What everything else stands on: results, targets, random numbers, memory, files."""
