"""`chiar bench`: one question a file, each checked against its reference before it is timed."""
