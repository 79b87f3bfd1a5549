"""The prototype head: rows sharded over workers, full or sparse softmax over all of them (docs/decisions/0008)."""
