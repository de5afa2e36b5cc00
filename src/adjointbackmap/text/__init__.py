"""Sentences: words and token numbers, two small networks, and the movie reviews they learn from."""
