"""Check results: the problems, the error rules, and the judgement of a provider."""
