"""One module per library: `make(options) -> run`, `run() -> scores [Q, N]`, positive where a training example helps."""
