"""Why no data comes, or data that teaches nothing: the known traps of API, trainer and vLLM server."""
