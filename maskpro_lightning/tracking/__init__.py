"""What a run logs, writes and draws."""
