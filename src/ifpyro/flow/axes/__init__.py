"""The coordinates of a flow: mean, rotation and scales of the data, and the schedule of angles on them."""
