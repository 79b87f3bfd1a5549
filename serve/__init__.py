"""A release in, answers out: the engine, the Ray Serve application, the page and the evaluation."""
