"""Policies: which window to scan next. Each is a frozen value that is its own configuration and its own function."""
