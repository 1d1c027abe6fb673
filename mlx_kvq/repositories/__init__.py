"""Model repositories that bring their cache along."""
