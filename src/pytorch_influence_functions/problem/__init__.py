"""The trained model with its loss and data, and the only loop over data."""
