"""What runs inside the vLLM server: the `/generate` route of Atropos and the registration of our weight transfer engines."""
