"""`chiar plan`: what a recipe costs, before it runs."""
