"""The training loop and what runs it, on one process or many. Imports all rooms."""
