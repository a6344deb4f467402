"""The movers of bytes, each with the engine that receives them inside the server's workers."""
