"""Per-example gradients, and products with them that are never written out."""
