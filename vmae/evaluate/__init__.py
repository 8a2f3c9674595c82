"""Looking at what a model learned."""
