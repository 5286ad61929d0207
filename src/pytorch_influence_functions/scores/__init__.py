"""The result: values, labels, and how far to trust them."""
