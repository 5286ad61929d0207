"""The methods of the papers as compositions, and the baselines any method has to beat."""
