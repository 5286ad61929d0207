"""A method fitted to a problem, and the pass that turns queries into scores."""
