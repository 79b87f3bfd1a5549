"""Records in, items out: sources, normalising, ingest and the reader of items; also the shop that the demo draws."""
