"""Which token takes which operator: scores, decisions, dispatch."""
