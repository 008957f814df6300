"""Whether results are right: what is computed, what it is held to, and the judgement."""
