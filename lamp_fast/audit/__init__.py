"""What looks wrong in a data set: labels, copies, pictures that belong to nothing."""
