"""The training methods, a file each; `forward` is the loss. Imports all rooms but `evaluation` and `training`."""
