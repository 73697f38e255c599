"""Scores of images. Imports all rooms but `recipes` and `training`."""
