"""Items in, models out: the embedder with its prototypes, and the listwise reranker."""
