"""The one door for checkpoints: their format, a run's folder, published and Hugging Face names, and models made of them."""
