"""Records from anyone: what a source holds (sources), a function a format that reads it (readers), pictures by reference (fetch)."""
