"""Scores of images, and the toy world they are tested in. Imports all rooms but `recipes` and `training`."""
