"""Kronecker-factored curvature: K-FAC, EK-FAC and Shampoo."""
