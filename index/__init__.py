"""Embedder and items in, FAISS shards out: bulk encoding, plan, build, merge, searcher and release."""
